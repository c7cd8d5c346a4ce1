// dialect_opencl.h: the dialect's names in C++ for OpenCL, so that clang checks Metal's address spaces
// and the Intel CPU runtime runs the bodies with sub-groups of 32. Used by tests only.
// The generator adds the argument simd_order, which permutes the SIMD groups of a threadgroup.

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private

typedef uint uint32_t;
typedef ushort uint16_t;
typedef uchar uint8_t;
typedef int int32_t;
typedef half float16_t;

struct bfloat16_t {
  ushort bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint u = as_uint(value);
    bits = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const __generic { return as_float((uint)bits << 16); }
  operator float() const __constant { return as_float((uint)bits << 16); }
};

#define FM_FN inline
// Threadgroup memory starts as NaN: what a body reads before it was written shows in the result.
#define FM_THREADGROUP_ARRAY(type, name, count) \
  __local type name[count];                     \
  fm_poison((__local uint*)name, sizeof(type) * (count) / 4)

inline void fm_poison(__local uint* words, uint count) {
  for (uint i = get_local_linear_id(); i < count; i += get_local_size(0) * get_local_size(1) * get_local_size(2)) {
    words[i] = 0x7fc00000u;
  }
  barrier(CLK_LOCAL_MEM_FENCE);
}

struct fm_uint3 {
  uint x, y, z;
};
inline uint fm_simd_group(uint order) {
  const uint group = get_sub_group_id();
  const uint count = get_num_sub_groups();
  return order == 0 ? group : order == 1 ? count - 1u - group : (group + 1u) % count;
}
#define simdgroup_index_in_threadgroup (fm_simd_group(simd_order))
#define thread_index_in_simdgroup (get_sub_group_local_id())
#define thread_index_in_threadgroup (simdgroup_index_in_threadgroup * 32u + get_sub_group_local_id())

inline float fm_float(uint bits) { return as_float(bits); }
// As on Metal.
inline float fm_field(uint word, uint mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f

namespace metal {
inline float fma(float a, float b, float c) { return ::fma(a, b, c); }
inline float exp(float a) { return ::exp(a); }
inline float log(float a) { return ::log(a); }
inline float sqrt(float a) { return ::sqrt(a); }
inline float abs(float a) { return ::fabs(a); }
inline float max(float a, float b) { return ::fmax(a, b); }
inline uint min(uint a, uint b) { return a < b ? a : b; }
}  // namespace metal

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
#define threadgroup_barrier(flags) barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE)
inline float simd_sum(float value) { return sub_group_reduce_add(value); }
inline float simd_shuffle_xor(float value, ushort mask) { return sub_group_shuffle_xor(value, (uint)mask); }

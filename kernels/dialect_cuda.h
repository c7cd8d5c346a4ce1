// dialect_cuda.h: the dialect's names in CUDA. The loader has removed the words device, constant,
// threadgroup and thread from the text before, because they are parts of CUDA's own names.

#define FM_FN __device__ __forceinline__
#define FM_THREADGROUP_ARRAY(type, name, count) __shared__ type name[count]

typedef unsigned int uint;
typedef unsigned short ushort;
typedef __nv_bfloat16 bfloat16_t;
typedef __half float16_t;

// Thread ids. Metal's SIMD group is 32 consecutive threads of the threadgroup, as CUDA's warp is.
FM_FN uint fm_linear_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
#define thread_index_in_threadgroup (fm_linear_thread())
#define thread_index_in_simdgroup (fm_linear_thread() & 31u)
#define simdgroup_index_in_threadgroup (fm_linear_thread() >> 5)
#define threadgroup_position_in_grid blockIdx
#define thread_position_in_grid                                               \
  (make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
              blockIdx.z * blockDim.z + threadIdx.z))

FM_FN float fm_float(uint32_t bits) { return __uint_as_float(bits); }

// The bits of word under mask as a float, in units of 2^-149: the integer as a denormal number, which takes no
// second instruction, and which NVIDIA's fma reads and multiplies at full speed. x is staged so much larger that
// products are normal numbers from x q = 2^-52 upwards; x must be below 2^52. (As assembly, because nvcc moves
// plain ands in front of a barrier, all of them, and then has not enough registers.)
FM_FN float fm_field(uint32_t word, uint32_t mask) {
  uint32_t out;
  asm("and.b32 %0, %1, %2;" : "=r"(out) : "r"(word), "r"(mask));
  return __uint_as_float(out);
}
#define FM_STAGED_EXPONENT 75
#define FM_DOT_SCALE 18889465931478580854784.0f  // 2^(149 - FM_STAGED_EXPONENT)

namespace metal {
FM_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FM_FN float exp(float a) { return ::expf(a); }
FM_FN float log(float a) { return ::logf(a); }
FM_FN float sqrt(float a) { return __fsqrt_rn(a); }
FM_FN float abs(float a) { return ::fabsf(a); }
FM_FN float max(float a, float b) { return ::fmaxf(a, b); }
FM_FN uint min(uint a, uint b) { return a < b ? a : b; }
}  // namespace metal

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
FM_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }

FM_FN float simd_shuffle_xor(float value, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
FM_FN float simd_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

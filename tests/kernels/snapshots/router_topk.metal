#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]
FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }
FM_FN float fm_field(uint32_t word, uint32_t mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f

[[kernel]] void custom_kernel_flash_moe_router_topk_7521dde36cc4_float_uint32_t_uint32_t_float_uint32_t(
  const device float* logits [[buffer(0)]],
  const device uint32_t* table [[buffer(1)]],
  device uint32_t* ids [[buffer(2)]],
  device float* weights [[buffer(3)]],
  device uint32_t* slots [[buffer(4)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
constexpr int E = 40;
constexpr int PITCH = 41;
constexpr int K = 3;
constexpr bool NORMALISE = true;
constexpr bool HAS_TABLE = true;
constexpr int SIMD_GROUPS = 8;
FM_THREADGROUP_ARRAY(float, values, E);
FM_THREADGROUP_ARRAY(float, best, K);
FM_THREADGROUP_ARRAY(uint32_t, chosen, K);
const uint lane = thread_index_in_simdgroup;
const uint thread_number = simdgroup_index_in_threadgroup * 32 + lane;
const uint token = threadgroup_position_in_grid.x;
for (uint expert = thread_number; expert < E; expert += SIMD_GROUPS * 32) {
  values[expert] = logits[size_t(token) * PITCH + expert];
}
if (thread_number < K) {
  best[thread_number] = fm_float(0x7fc00000u);
  chosen[thread_number] = thread_number;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint expert = thread_number; expert < E; expert += SIMD_GROUPS * 32) {
  const float own = values[expert];
  uint rank = 0;
#pragma unroll 8
  for (uint other = 0; other < E; other++) {
    const float value = values[other];
    rank += !(value <= own) || (value == own && other > expert) ? 1 : 0;
  }
  if (rank < K) {
    best[rank] = own;
    chosen[rank] = expert;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simdgroup_index_in_threadgroup == 0) {
  float sum = 0.0f;
  if (NORMALISE) {
    for (uint k = 0; k < K; k++) {
      sum += metal::exp(best[k] - best[0]);
    }
  } else {
    for (uint expert = lane; expert < E; expert += 32) {
      sum += metal::exp(values[expert] - best[0]);
    }
    sum = simd_sum(sum);
  }
  if (lane < K) {
    const uint expert = chosen[lane];
    ids[token * K + lane] = expert;
    weights[token * K + lane] = metal::exp(best[lane] - best[0]) / sum;
    slots[token * K + lane] = HAS_TABLE ? table[expert] : expert;
  }
}

}

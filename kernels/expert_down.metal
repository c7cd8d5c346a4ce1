// expert_down.metal: down projection of the routed experts, one output row per expert (decode)
// Math     y[p,n] = sum_i Wd[n,i] h[p,i], for pair p = (token, slot), w = q*scale + bias
// FMA      sum_i (q s + z) h = s sum_i q h + z sum_i h: one fma per weight, the sum of h shared by all rows
// Inputs   h, bank, slots
// Outputs  y
// Shapes   h (T K, I) f32, bank (S, RECORD) u32, slots (T, K) u32, y (T K, H) f32
// Threads  grid (32 T K, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a SIMD group computes
//          32/LANES x ROWS rows of one expert, LANES lanes per row, each lane taking a chunk of 32 weights at a time
// Traffic  T K H I (bits + 32/G) / 8 bytes of weights, once; h from threadgroup memory
// Fused    nothing: outputs stay separate, so that moe_combine adds them in the router's order
// Assumes  I % G == 0, parts of the record on 16-byte boundaries; f32 sums
#include "quantized.h"
// --- body ---
FM_THREADGROUP_ARRAY(float4, staged_memory, TILE / FM_CHUNK * FM_STRIDE / 4);
threadgroup float* staged = (threadgroup float*)staged_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint pair = threadgroup_position_in_grid.x;
const uint row_set = (threadgroup_position_in_grid.y * SIMD_GROUPS + simd_group) * (32 / LANES) + lane / LANES;
const uint first_row = row_set * ROWS;

const device float* row_of_h = h + size_t(pair) * I;
const device uint32_t* record = bank + size_t(metal::min(uint(slots[pair]), uint(bank_shape[0] - 1))) * RECORD;
const device uint32_t* words = record + DOWN_WEIGHT;
const device DOWN_S* scales = (const device DOWN_S*)(record + DOWN_SCALES);
const device DOWN_S* biases = (const device DOWN_S*)(record + DOWN_BIASES);

float total[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  total[r] = 0.0f;
}

// The first weights are on their way while h is staged; later ones while their predecessors are used.
FmRows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S> next;
uint chunk = lane % LANES;
if (chunk < I / FM_CHUNK) {
  fm_load_rows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S, I, DOWN_WIDTH>(
      next, words, scales, biases, first_row, H - 1, chunk);
}

for (uint tile = 0; tile < I; tile += TILE) {
  const uint width = metal::min(uint(TILE), I - tile);
  if (tile > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  fm_stage_tile<SCALED_BITS, TILE, SIMD_GROUPS>(staged, row_of_h + tile, width, simd_group, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll 1
  for (; chunk < (tile + width) / FM_CHUNK; chunk += LANES) {
    const FmRows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S> rows = next;
    if (chunk + LANES < I / FM_CHUNK) {
      fm_load_rows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S, I, DOWN_WIDTH>(
          next, words, scales, biases, first_row, H - 1, chunk + LANES);
    }
    const threadgroup float* chunk_of_h = staged + (chunk - tile / FM_CHUNK) * FM_STRIDE;
    const threadgroup float4* fours_of_h = (const threadgroup float4*)chunk_of_h;
    float dot[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      dot[r] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      fm_multiply<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S, (SCALED_BITS > 0)>(
          rows, i * 8, fours_of_h[2 * i], fours_of_h[2 * i + 1], dot);
    }
    fm_fold<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S>(rows, dot, chunk_of_h[FM_CHUNK], total);
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  float sum = fm_lane_sum<LANES>(total[r]);
  const uint row = first_row + r;
  if (lane % LANES == 0 && row < H) {
    if (DOWN_HAS_BIAS) {
      sum += float(((const device DOWN_B*)(record + DOWN_BIAS))[row]);
    }
    y[size_t(pair) * H + row] = sum;
  }
}

// expert_gate_up.metal: gate and up projections of the routed experts, with SwiGLU (decode)
// Math     h[p,i] = silu(sum_j Wg[i,j] x[j]) * sum_j Wu[i,j] x[j], for pair p = (token, slot), w = q*scale + bias
// FMA      sum_j (q s + z) x = s sum_j q x + z sum_j x: one fma a weight, the sum of x shared by all rows
// Inputs   x, bank, slots
// Outputs  h
// Shapes   x (T, H), bank (S, RECORD) u32, slots (T, K) u32, h (T K, I) f32
// Threads  grid (32 T K, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a SIMD group computes
//          32/LANES x ROWS rows of one expert, LANES lanes a row, a chunk of 32 weights a lane at a time
// Traffic  T K I H 2 (bits + 32/G) / 8 bytes of weights, once; x from threadgroup memory
// Fused    2 matvecs + activation; the gate and up rows of a lane share each read of x
// Assumes  H % G == 0, parts of the record on 16-byte boundaries; f32 sums
#include "quantized.h"
// --- body ---
FM_THREADGROUP_ARRAY(float4, staged_memory, TILE / FM_CHUNK * FM_STRIDE / 4);
threadgroup float* staged = (threadgroup float*)staged_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint pair = threadgroup_position_in_grid.x;
const uint row_set = (threadgroup_position_in_grid.y * SIMD_GROUPS + simd_group) * (32 / LANES) + lane / LANES;
const uint first_row = row_set * ROWS;

const device X* row_of_x = x + size_t(pair / uint(slots_shape[1])) * H;
const device uint32_t* record = bank + size_t(slots[pair]) * RECORD;
const device uint32_t* gate_words = record + GATE_WEIGHT;
const device GATE_S* gate_scales = (const device GATE_S*)(record + GATE_SCALES);
const device GATE_S* gate_biases = (const device GATE_S*)(record + GATE_BIASES);
const device uint32_t* up_words = record + UP_WEIGHT;
const device UP_S* up_scales = (const device UP_S*)(record + UP_SCALES);
const device UP_S* up_biases = (const device UP_S*)(record + UP_BIASES);

float gate[ROWS];
float up[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  gate[r] = 0.0f;
  up[r] = 0.0f;
}

// The first weights are on their way while x is staged; later ones while their predecessors are used.
FmRows<GATE_BITS, GATE_GROUP, ROWS, GATE_S> gate_next;
FmRows<UP_BITS, UP_GROUP, ROWS, UP_S> up_next;
uint chunk = lane % LANES;
if (chunk < H / FM_CHUNK) {
  fm_load_rows<GATE_BITS, GATE_GROUP, ROWS, GATE_S, H, GATE_WIDTH>(
      gate_next, gate_words, gate_scales, gate_biases, first_row, I - 1, chunk);
  fm_load_rows<UP_BITS, UP_GROUP, ROWS, UP_S, H, UP_WIDTH>(
      up_next, up_words, up_scales, up_biases, first_row, I - 1, chunk);
}

for (uint tile = 0; tile < H; tile += TILE) {
  const uint width = metal::min(uint(TILE), H - tile);
  if (tile > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  fm_stage_tile<SCALED_BITS, TILE, SIMD_GROUPS>(staged, row_of_x + tile, width, simd_group, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll 1
  for (; chunk < (tile + width) / FM_CHUNK; chunk += LANES) {
    const FmRows<GATE_BITS, GATE_GROUP, ROWS, GATE_S> gate_rows = gate_next;
    const FmRows<UP_BITS, UP_GROUP, ROWS, UP_S> up_rows = up_next;
    if (chunk + LANES < H / FM_CHUNK) {
      fm_load_rows<GATE_BITS, GATE_GROUP, ROWS, GATE_S, H, GATE_WIDTH>(
          gate_next, gate_words, gate_scales, gate_biases, first_row, I - 1, chunk + LANES);
      fm_load_rows<UP_BITS, UP_GROUP, ROWS, UP_S, H, UP_WIDTH>(
          up_next, up_words, up_scales, up_biases, first_row, I - 1, chunk + LANES);
    }
    const threadgroup float* chunk_of_x = staged + (chunk - tile / FM_CHUNK) * FM_STRIDE;
    const threadgroup float4* fours_of_x = (const threadgroup float4*)chunk_of_x;
    float gate_dot[ROWS];
    float up_dot[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      gate_dot[r] = 0.0f;
      up_dot[r] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float4 low = fours_of_x[2 * i];
      const float4 high = fours_of_x[2 * i + 1];
      fm_multiply<GATE_BITS, GATE_GROUP, ROWS, GATE_S, (SCALED_BITS > 0)>(
          gate_rows, i * 8, low, high, gate_dot);
      fm_multiply<UP_BITS, UP_GROUP, ROWS, UP_S, (SCALED_BITS > 0)>(
          up_rows, i * 8, low, high, up_dot);
    }
    const float sum = chunk_of_x[FM_CHUNK];
    fm_fold<GATE_BITS, GATE_GROUP, ROWS, GATE_S>(gate_rows, gate_dot, sum, gate);
    fm_fold<UP_BITS, UP_GROUP, ROWS, UP_S>(up_rows, up_dot, sum, up);
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  float gate_sum = fm_lane_sum<LANES>(gate[r]);
  float up_sum = fm_lane_sum<LANES>(up[r]);
  const uint row = first_row + r;
  if (lane % LANES == 0 && row < I) {
    if (GATE_HAS_BIAS) {
      gate_sum += float(((const device GATE_B*)(record + GATE_BIAS))[row]);
    }
    if (UP_HAS_BIAS) {
      up_sum += float(((const device UP_B*)(record + UP_BIAS))[row]);
    }
    h[size_t(pair) * I + row] = gate_sum / (1.0f + metal::exp(-gate_sum)) * up_sum;
  }
}

// expert_down_combine.metal: down projection of the routed experts and all that follows it in the layer (decode)
// Math     out[t,n] = sum_k w[t,k] (sum_i Wd[n,i] h[t,k,i]) + sigmoid(g[t]) shared[t,n] + residual[t,n], k in order
// FMA      sum_i (q s + z) h = s sum_i q h + z sum_i h: one fma a weight, the sum of h shared by all rows
// Inputs   h, bank, slots, weights, shared, shared_gate, residual
// Outputs  out
// Shapes   h (T K, I) f32, bank (S, RECORD) u32, slots (T, K) u32, weights (T, K), shared (T, H),
//          shared_gate (T, 1), residual (T, H), out (T, H)
// Threads  grid (32 T, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a SIMD group computes
//          32/LANES x ROWS outputs of one token, all its experts one after the other
// Traffic  T K H I (bits + 32/G) / 8 bytes of weights, once; the per-expert outputs stay in registers
// Fused    down projection, weighting, sum, shared gate, residual: the bits of expert_down and moe_combine
// Assumes  as expert_down, and I <= TILE; an input that is absent is replaced by any other and not read
#include "quantized.h"
// --- body ---
constexpr int PITCH = TILE / FM_CHUNK * FM_STRIDE;
FM_THREADGROUP_ARRAY(float4, staged_memory, 2 * PITCH / 4);
threadgroup float* staged = (threadgroup float*)staged_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.x;
const uint experts = slots_shape[1];
const uint row_set = (threadgroup_position_in_grid.y * SIMD_GROUPS + simd_group) * (32 / LANES) + lane / LANES;
const uint first_row = row_set * ROWS;
const uint first_chunk = lane % LANES;
const device float* rows_of_h = h + size_t(token) * experts * I;

float combined[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  combined[r] = 0.0f;
}

// Weights and h of the next step are on their way while this one is computed, across experts too.
FmRows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S> next;
float4 next_h[FM_TILE_STEPS(TILE, SIMD_GROUPS)];
fm_request_tile<TILE, SIMD_GROUPS>(next_h, rows_of_h, I, simd_group, lane);
const device uint32_t* record = bank + size_t(slots[token * experts]) * RECORD;
if (first_chunk < I / FM_CHUNK) {
  fm_load_rows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S, I, DOWN_WIDTH>(
      next, record + DOWN_WEIGHT, (const device DOWN_S*)(record + DOWN_SCALES),
      (const device DOWN_S*)(record + DOWN_BIASES), first_row, H - 1, first_chunk);
}

for (uint k = 0; k < experts; k++) {
  // Two buffers in turn: who is a step ahead writes the one that nobody reads, so one barrier a step is enough.
  threadgroup float* own = staged + k % 2 * PITCH;
  fm_store_tile<SCALED_BITS, TILE, SIMD_GROUPS>(own, next_h, I, simd_group, lane);
  const uint following = metal::min(k + 1, experts - 1);
  fm_request_tile<TILE, SIMD_GROUPS>(next_h, rows_of_h + size_t(following) * I, I, simd_group, lane);
  const device uint32_t* next_record = bank + size_t(slots[token * experts + following]) * RECORD;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float total[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    total[r] = 0.0f;
  }
#pragma unroll 1
  for (uint chunk = first_chunk; chunk < I / FM_CHUNK; chunk += LANES) {
    const FmRows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S> rows = next;
    const bool last = chunk + LANES >= I / FM_CHUNK;
    const device uint32_t* source = last ? next_record : record;
    if (!last || k + 1 < experts) {
      fm_load_rows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S, I, DOWN_WIDTH>(
          next, source + DOWN_WEIGHT, (const device DOWN_S*)(source + DOWN_SCALES),
          (const device DOWN_S*)(source + DOWN_BIASES), first_row, H - 1, last ? first_chunk : chunk + LANES);
    }
    const threadgroup float* chunk_of_h = own + chunk * FM_STRIDE;
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

  const float weight = float(weights[token * experts + k]);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float sum = fm_lane_sum<LANES>(total[r]);
    if (DOWN_HAS_BIAS) {
      sum += float(((const device DOWN_B*)(record + DOWN_BIAS))[metal::min(first_row + r, uint(H - 1))]);
    }
    combined[r] = metal::fma(weight, sum, combined[r]);
  }
  record = next_record;
}

float open = 1.0f;
if (HAS_GATE) {
  open = 1.0f / (1.0f + metal::exp(-float(shared_gate[token])));
}
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const uint row = first_row + r;
  if (lane % LANES == 0 && row < H) {
    const size_t element = size_t(token) * H + row;
    float value = combined[r];
    if (HAS_SHARED) {
      value = metal::fma(open, float(shared[element]), value);
    }
    if (HAS_RESIDUAL) {
      value += float(residual[element]);
    }
    out[element] = static_cast<OUT>(value);
  }
}

// expert_down_combine.metal: down projections of a token's experts and all that follows in the layer (decode)
// Math     out[t,n] = sum_k w[t,k] (sum_i Wd[n,i] h[t,k,i]) + sigmoid(g[t]) shared[t,n] + residual[t,n], k in order
// FMA      sum_i (q s + z) h = s sum_i q h + z sum_i h: one fma per weight, the sum of h shared by all rows
// Inputs   h, bank, slots, weights, shared, shared_gate, residual
// Outputs  out
// Shapes   h f32: (T K, I), then (T, SHARED_I) with SHARED_EXPERT; bank (S, RECORD) u32, slots (T, K) u32,
//          weights (T, K), shared (SHARED_RECORD) u32 with SHARED_EXPERT, else (T, H), shared_gate (T, GATE_PITCH),
//          its element GATE_AT, residual (T, H), out (T, H)
// Threads  grid (32 T, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a threadgroup computes TILE_ROWS
//          outputs of a token, each SIMD group one expert at a time, in ROUNDS rounds; then they are added in order
// Traffic  (T K I + T SHARED_I) H (bits + 32/G) / 8 bytes of weights, once; an expert's outputs never leave the GPU
// Fused    down projections, shared expert, weighting, sum, shared gate, residual: the bits of expert_down, moe_combine
// Assumes  as expert_down; an input that is absent is replaced by any other and not read
#include "quantized.h"
#include "expert.h"
// --- body ---
typedef FmPart<DOWN_BITS, DOWN_GROUP, DOWN_WIDTH, DOWN_S, DOWN_WEIGHT, DOWN_SCALES, DOWN_BIASES> DownPart;
typedef FmPart<
    SHARED_DOWN_BITS, SHARED_DOWN_GROUP, SHARED_DOWN_WIDTH, SHARED_DOWN_S, SHARED_DOWN_WEIGHT, SHARED_DOWN_SCALES,
    SHARED_DOWN_BIASES>
    SharedPart;
constexpr int PITCH = TILE / FM_CHUNK * FM_STRIDE;
constexpr int TILE_ROWS = SETS * (32 / LANES) * ROWS;
constexpr int EXPERTS = K + SHARED_EXPERT;
FM_THREADGROUP_ARRAY(float4, staged_memory, SIMD_GROUPS * PITCH / 4);
FM_THREADGROUP_ARRAY(float, sums, EXPERTS * TILE_ROWS);

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.x;
const uint first_row = threadgroup_position_in_grid.y * TILE_ROWS;
const uint lane_row = first_row + lane / LANES * ROWS;
const uint first_chunk = lane % LANES;
threadgroup float* own = (threadgroup float*)staged_memory + simd_group * PITCH;

for (uint round = 0; round < ROUNDS; round++) {
  const uint expert = round * SIMD_GROUPS + simd_group;
  const bool is_shared = SHARED_EXPERT && expert == K;
  const bool other_parts = is_shared && !SAME_PARTS;
  const uint pair = token * K + metal::min(expert, uint(K - 1));
  const device uint32_t* record = bank + size_t(metal::min(uint(slots[pair]), uint(bank_shape[0] - 1))) * RECORD;
  const device float* row_of_h = h + size_t(pair) * I;
  if (is_shared) {
    record = (const device uint32_t*)shared;
    row_of_h = h + size_t(uint(slots_shape[0])) * K * I + token * SHARED_I;
  }

  // The first weights are on their way while h is staged, each SIMD group its own expert's.
  FmRows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S> next;
  FmRows<SHARED_DOWN_BITS, SHARED_DOWN_GROUP, ROWS, SHARED_DOWN_S> shared_next;
  if (round > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (other_parts) {
    if (first_chunk < SHARED_I / FM_CHUNK) {
      fm_load_part<SharedPart, ROWS, SHARED_I>(shared_next, record, lane_row, H - 1, first_chunk);
    }
    fm_stage_tile<SHARED_SCALED_BITS, TILE, 1>(own, row_of_h, SHARED_I, 0, lane);
  } else if (expert < EXPERTS) {
    if (first_chunk < I / FM_CHUNK) {
      fm_load_part<DownPart, ROWS, I>(next, record, lane_row, H - 1, first_chunk);
    }
    fm_stage_tile<SCALED_BITS, TILE, 1>(own, row_of_h, I, 0, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (other_parts) {
    fm_down_rows<SharedPart, ROWS, LANES, SHARED_I, SETS, (SHARED_SCALED_BITS > 0)>(
        shared_next, record, first_row, H - 1, own, lane, sums + K * TILE_ROWS);
  } else if (expert < EXPERTS) {
    fm_down_rows<DownPart, ROWS, LANES, I, SETS, (SCALED_BITS > 0)>(
        next, record, first_row, H - 1, own, lane, sums + expert * TILE_ROWS);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const uint own_row = lane * SIMD_GROUPS + simd_group;
const uint row = first_row + own_row;
if (own_row < TILE_ROWS && row < H) {
  float value = 0.0f;
#pragma unroll
  for (uint k = 0; k < K; k++) {
    float sum = sums[k * TILE_ROWS + own_row];
    if (DOWN_HAS_BIAS) {
      const uint slot = metal::min(uint(slots[token * K + k]), uint(bank_shape[0] - 1));
      sum += float(((const device DOWN_B*)(bank + size_t(slot) * RECORD + DOWN_BIAS))[row]);
    }
    value = metal::fma(float(weights[token * K + k]), sum, value);
  }
  float open = 1.0f;
  if (HAS_GATE) {
    open = 1.0f / (1.0f + metal::exp(-float(shared_gate[token * GATE_PITCH + GATE_AT])));
  }
  const size_t element = size_t(token) * H + row;
  if (SHARED_EXPERT) {
    value = metal::fma(open, sums[K * TILE_ROWS + own_row], value);
  } else if (HAS_SHARED) {
    value = metal::fma(open, float(((const device SHARED_X*)shared)[element]), value);
  }
  if (HAS_RESIDUAL) {
    value += float(residual[element]);
  }
  out[element] = static_cast<OUT>(value);
}

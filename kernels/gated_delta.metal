// gated_delta.metal: gated delta rule over T tokens in one launch, state in registers
// Math     S = g S; S += beta (v - S k) k^T; y = S q, one token after the other, with q/|q|/sqrt(DK), k/|k|,
//          g = exp(-exp(A_log) softplus(a + dt_bias)), beta = sigmoid(b)
// FMA      S q and S k in one pass over S: y = (g S) q + beta (v - (g S) k) (k . q)
// Inputs   queries, keys, values, decay_in, beta_in, A_log, dt_bias, state_in, mask
// Outputs  y, state_out
// Shapes   queries, keys (B, T, HK, DK), values, y (B, T, HV, DV), decay_in, beta_in (B, T, HV),
//          A_log, dt_bias (HV) f32, state_in, state_out (B, HV, DV, DK) f32, mask (B, T) bool
// Threads  grid (32 B HV, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a threadgroup owns
//          SIMD_GROUPS x 32/LANES x ROWS rows of one head's state, LANES lanes per row (see delta.h)
// Traffic  the state once in, once out, whatever T; q and k once for each tile of rows
// Fused    decay, beta, normalisation of q and k, recurrence, readout, mask
// Assumes  DK % 32 == 0, DK % (4 LANES) == 0; everything in f32. Without HAS_MASK, mask is not read
#include "delta.h"
// --- body ---
constexpr int TILE_ROWS = SIMD_GROUPS * (32 / LANES) * ROWS;
FM_THREADGROUP_ARRAY(float4, query_memory, STEPS * DK / 4);
FM_THREADGROUP_ARRAY(float4, key_memory, STEPS * DK / 4);
FM_THREADGROUP_ARRAY(float, value_memory, STEPS * TILE_ROWS);
FM_THREADGROUP_ARRAY(float, decay_memory, STEPS);
FM_THREADGROUP_ARRAY(float, beta_memory, STEPS);
FM_THREADGROUP_ARRAY(float, dot_memory, STEPS);
threadgroup float* query = (threadgroup float*)query_memory;
threadgroup float* key = (threadgroup float*)key_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint batch = threadgroup_position_in_grid.x / HV;
const uint head = threadgroup_position_in_grid.x % HV;
const uint key_head = head / (HV / HK);
const uint tile_row = threadgroup_position_in_grid.y * TILE_ROWS;
const uint own_row = (simd_group * (32 / LANES) + lane / LANES) * ROWS;
const uint lane_in_row = lane % LANES;
const uint length = keys_shape[1];

float4 state[ROWS][DK / LANES / 4];
const size_t own_state = size_t(threadgroup_position_in_grid.x) * DV * (DK / 4);
const device float4* state_source = (const device float4*)state_in + own_state;
device float4* state_target = (device float4*)state_out + own_state;
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const uint row = metal::min(tile_row + own_row + r, uint(DV - 1));
#pragma unroll
  for (int i = 0; i < DK / LANES / 4; i++) {
    state[r][i] = state_source[row * (DK / 4) + i * LANES + lane_in_row];
  }
}

// Each SIMD group prepares every SIMD_GROUPSth token, and its part of the values. What it needs for the next STEPS
// tokens is on its way while these are computed.
constexpr int OWN = (STEPS + SIMD_GROUPS - 1) / SIMD_GROUPS;
constexpr int OWN_VALUES = (STEPS * TILE_ROWS + SIMD_GROUPS * 32 - 1) / (SIMD_GROUPS * 32);
FmTokens<OWN, DK> tokens;
float own_values[OWN_VALUES];
const uint first_token = batch * length;
const uint last_token = first_token + length - 1;
const float rate = metal::exp(float(A_log[head]));
const float shift = float(dt_bias[head]);

for (uint start = 0; start < length + STEPS; start += STEPS) {
  if (start > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    fm_prepare_tokens<OWN, SIMD_GROUPS, DK, STEPS>(
        query, key, decay_memory, beta_memory, dot_memory, tokens, rate, shift, simd_group, lane);
#pragma unroll
    for (int i = 0; i < OWN_VALUES; i++) {
      const uint place = (i * SIMD_GROUPS + simd_group) * 32 + lane;
      if (place < uint(STEPS * TILE_ROWS)) {
        value_memory[place] = own_values[i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (start < length) {
    fm_request_tokens<OWN, SIMD_GROUPS, DK, HK>(
        tokens, queries, keys, first_token + start + simd_group, last_token, key_head, lane);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const size_t token = metal::min(first_token + start + simd_group + i * SIMD_GROUPS, last_token);
      tokens.decay[i] = float(decay_in[token * HV + head]);
      tokens.beta[i] = float(beta_in[token * HV + head]);
    }
#pragma unroll
    for (int i = 0; i < OWN_VALUES; i++) {
      const uint place = (i * SIMD_GROUPS + simd_group) * 32 + lane;
      const size_t token = metal::min(first_token + start + place / TILE_ROWS, last_token);
      const uint row = metal::min(tile_row + place % TILE_ROWS, uint(DV - 1));
      own_values[i] = float(values[(token * HV + head) * DV + row]);
    }
  }

  // The tokens before start are in threadgroup memory.
  const uint first = start > 0 ? start - STEPS : 0;
  const uint steps = metal::min(start, length) - metal::min(first, length);
  for (uint step = 0; step < steps; step++) {
    const size_t token = first_token + first + step;
    float value[ROWS];
    float out[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      value[r] = value_memory[step * TILE_ROWS + own_row + r];
      out[r] = 0.0f;
    }
    bool real = true;
    if (HAS_MASK) {
      real = mask[token];
    }
    // All lanes of the threadgroup see the same token, so they take the branch together.
    if (real) {
      fm_delta_step<DK, LANES, ROWS>(
          state, query + step * DK, key + step * DK, decay_memory[step], beta_memory[step], dot_memory[step],
          1.0f, 1.0f, lane_in_row, value, out);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint row = tile_row + own_row + r;
      if (lane_in_row == 0 && row < DV) {
        y[(token * HV + head) * DV + row] = static_cast<X>(out[r]);
      }
    }
  }
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const uint row = tile_row + own_row + r;
  if (row < DV) {
#pragma unroll
    for (int i = 0; i < DK / LANES / 4; i++) {
      state_target[row * (DK / 4) + i * LANES + lane_in_row] = state[r][i];
    }
  }
}

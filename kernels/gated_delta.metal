// gated_delta.metal: gated delta rule over T tokens in one launch, state in registers
// Math     S = g S; S += beta (v - S k) k^T; y = S q, a token after the other, with q/|q|/sqrt(DK), k/|k|,
//          g = exp(-exp(A_log) softplus(a + dt_bias)), beta = sigmoid(b)
// FMA      S q and S k in one pass over S: y = (g S) q + beta (v - (g S) k) (k . q)
// Inputs   queries, keys, values, decay_in, beta_in, A_log, dt_bias, state_in, mask
// Outputs  y, state_out
// Shapes   queries, keys (B, T, HK, DK), values, y (B, T, HV, DV), decay_in, beta_in (B, T, HV),
//          A_log, dt_bias (HV) f32, state_in, state_out (B, HV, DV, DK) f32, mask (B, T) bool
// Threads  grid (32 B HV, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a threadgroup owns
//          SIMD_GROUPS x 32/LANES x ROWS rows of one head's state, LANES lanes a row (see delta.h)
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

for (uint start = 0; start < length; start += STEPS) {
  const uint steps = metal::min(uint(STEPS), length - start);
  if (start > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  // A SIMD group prepares whole tokens: normalised q and k, their product, decay and beta.
  for (uint step = simd_group; step < steps; step += SIMD_GROUPS) {
    const size_t token = size_t(batch) * length + start + step;
    const size_t source = (token * HK + key_head) * DK;
    float q[DK / 32];
    float k[DK / 32];
    float q_squares = 0.0f;
    float k_squares = 0.0f;
    float product = 0.0f;
#pragma unroll
    for (int i = 0; i < DK / 32; i++) {
      q[i] = float(queries[source + i * 32 + lane]);
      k[i] = float(keys[source + i * 32 + lane]);
      q_squares = metal::fma(q[i], q[i], q_squares);
      k_squares = metal::fma(k[i], k[i], k_squares);
      product = metal::fma(q[i], k[i], product);
    }
    const float q_scale = 1.0f / (metal::sqrt(simd_sum(q_squares) + 1e-6f) * metal::sqrt(float(DK)));
    const float k_scale = 1.0f / metal::sqrt(simd_sum(k_squares) + 1e-6f);
    product = simd_sum(product) * q_scale * k_scale;
#pragma unroll
    for (int i = 0; i < DK / 32; i++) {
      query[step * DK + i * 32 + lane] = q[i] * q_scale;
      key[step * DK + i * 32 + lane] = k[i] * k_scale;
    }
    if (lane == 0) {
      const float rate = metal::exp(float(A_log[head]));
      const float time = fm_softplus(float(decay_in[token * HV + head]) + float(dt_bias[head]));
      decay_memory[step] = metal::exp(-rate * time);
      beta_memory[step] = fm_sigmoid(float(beta_in[token * HV + head]));
      dot_memory[step] = product;
    }
  }
  for (uint i = simd_group * 32 + lane; i < steps * TILE_ROWS; i += SIMD_GROUPS * 32) {
    const size_t token = size_t(batch) * length + start + i / TILE_ROWS;
    const uint row = metal::min(tile_row + i % TILE_ROWS, uint(DV - 1));
    value_memory[i] = float(values[(token * HV + head) * DV + row]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint step = 0; step < steps; step++) {
    const size_t token = size_t(batch) * length + start + step;
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

// gated_delta_conv_step.metal: one token of a gated delta layer: causal convolution, SiLU, recurrence, readout
// Math     z = silu(sum_j w[c,j] [conv_in, qkv][j,c]); q, k, v = split(z); then as gated_delta for T = 1
// FMA      S q and S k in one pass over S: y = (g S) q + beta (v - (g S) k) (k . q)
// Inputs   qkv, conv_in, conv_weight, decay_in, beta_in, A_log, dt_bias, state_in
// Outputs  y, conv_out, state_out
// Shapes   qkv (B, 1, C), C = 2 HK DK + HV DV, conv_in, conv_out (B, TAPS - 1, C), conv_weight (C, TAPS),
//          decay_in, beta_in (B, 1, HV), A_log, dt_bias (HV) f32, state_in, state_out (B, HV, DV, DK) f32
// Threads  grid (32 B HV, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a threadgroup owns
//          SIMD_GROUPS x 32/LANES x ROWS rows of one head's state, LANES lanes a row (see delta.h)
// Traffic  the state once in, once out; q and k channels once for each tile of rows, from cache
// Fused    convolution, its state, SiLU, decay, beta, normalisation of q and k, recurrence, readout
// Assumes  DK % 32 == 0, DK % (4 LANES) == 0; f32, with z rounded to X as the separate convolution rounds it
#include "delta.h"
// --- body ---
constexpr int TILE_ROWS = SIMD_GROUPS * (32 / LANES) * ROWS;
constexpr int CHANNELS = 2 * HK * DK + HV * DV;
FM_THREADGROUP_ARRAY(float4, query_memory, DK / 4);
FM_THREADGROUP_ARRAY(float4, key_memory, DK / 4);
FM_THREADGROUP_ARRAY(float, value_memory, TILE_ROWS);
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

// Channels of this threadgroup: DK of q, DK of k, TILE_ROWS of v. The value heads that share a key head
// compute its channels each for itself; the first one's first tile writes their new convolution state.
const bool owns_key = head % (HV / HK) == 0 && threadgroup_position_in_grid.y == 0;
for (uint i = simd_group * 32 + lane; i < 2 * DK + TILE_ROWS; i += SIMD_GROUPS * 32) {
  const bool is_value = i >= 2 * DK;
  const uint value_row = tile_row + i - 2 * DK;
  uint channel = (i / DK) * (HK * DK) + key_head * DK + i % DK;
  bool owned = owns_key;
  if (is_value) {
    channel = 2 * HK * DK + head * DV + metal::min(value_row, uint(DV - 1));
    owned = value_row < DV;
  }
  float sum = 0.0f;
#pragma unroll
  for (int tap = 0; tap < TAPS - 1; tap++) {
    const X old = conv_in[size_t(batch * (TAPS - 1) + tap) * CHANNELS + channel];
    sum = metal::fma(float(conv_weight[channel * TAPS + tap]), float(old), sum);
    if (owned && tap > 0) {
      conv_out[size_t(batch * (TAPS - 1) + tap - 1) * CHANNELS + channel] = old;
    }
  }
  const X newest = qkv[size_t(batch) * CHANNELS + channel];
  sum = metal::fma(float(conv_weight[channel * TAPS + TAPS - 1]), float(newest), sum);
  if (owned) {
    conv_out[size_t(batch * (TAPS - 1) + TAPS - 2) * CHANNELS + channel] = newest;
  }
  const float mixed = float(static_cast<X>(sum * fm_sigmoid(sum)));
  if (is_value) {
    value_memory[i - 2 * DK] = mixed;
  } else if (i >= DK) {
    key[i - DK] = mixed;
  } else {
    query[i] = mixed;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Each SIMD group measures q and k for itself, which costs less than another barrier.
float q_squares = 0.0f;
float k_squares = 0.0f;
float product = 0.0f;
#pragma unroll
for (int i = 0; i < DK / 32; i++) {
  const float q = query[i * 32 + lane];
  const float k = key[i * 32 + lane];
  q_squares = metal::fma(q, q, q_squares);
  k_squares = metal::fma(k, k, k_squares);
  product = metal::fma(q, k, product);
}
const float q_scale = 1.0f / (metal::sqrt(simd_sum(q_squares) + 1e-6f) * metal::sqrt(float(DK)));
const float k_scale = 1.0f / metal::sqrt(simd_sum(k_squares) + 1e-6f);
product = simd_sum(product) * q_scale * k_scale;

const uint token = batch * HV + head;
const float time = fm_softplus(float(decay_in[token]) + float(dt_bias[head]));
const float decay = metal::exp(-metal::exp(float(A_log[head])) * time);
const float beta = fm_sigmoid(float(beta_in[token]));

float value[ROWS];
float out[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  value[r] = value_memory[own_row + r];
  out[r] = 0.0f;
}
fm_delta_step<DK, LANES, ROWS>(state, query, key, decay, beta, product, q_scale, k_scale, lane_in_row, value, out);

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const uint row = tile_row + own_row + r;
  if (row < DV) {
    if (lane_in_row == 0) {
      y[size_t(token) * DV + row] = static_cast<X>(out[r]);
    }
#pragma unroll
    for (int i = 0; i < DK / LANES / 4; i++) {
      state_target[row * (DK / 4) + i * LANES + lane_in_row] = state[r][i];
    }
  }
}

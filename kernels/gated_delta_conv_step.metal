// gated_delta_conv_step.metal: one token of a gated delta layer, between its joined projections and its output's
// Math     u = silu(sum_j w[c,j] [conv_in, qkv][j,c]); q, k, v = split(u); then as gated_delta for T = 1;
//          y = norm y / sqrt(mean(y^2) + EPS) * silu(z), the mean over each head
// FMA      S q and S k in one pass over S: y = (g S) q + beta (v - (g S) k) (k . q)
// Inputs   projected, conv_in, conv_weight, A_log, dt_bias, state_in, norm
// Outputs  y, conv_out, state_out
// Shapes   projected (B, PITCH): of key head h, q and k at Q_AT and K_AT + h QK_STEP, v and z of its HV/HK value heads
//          at V_AT and Z_AT + h V_STEP, b and a at B_AT and A_AT + h B_STEP; conv_in, conv_out (B, TAPS - 1, C),
//          C = 2 HK DK + HV DV, conv_weight (C, TAPS), A_log (HV) RATE, dt_bias (HV) SHIFT, norm (DV), y (B, HV, DV),
//          state_in, state_out (B, HV, DV, DK) f32
// Threads  grid (32 B HV, SIMD_GROUPS, 1), threadgroup (32, SIMD_GROUPS, 1): a threadgroup owns one head's state,
//          SIMD_GROUPS x 32/LANES x ROWS rows, LANES lanes per row (see delta.h)
// Traffic  the state once in, once out; q and k channels once for each value head, from cache
// Fused    split, convolution, its state, SiLU, decay, beta, norm of q and k, recurrence, readout, gated norm
// Assumes  DK % 32 == 0, DK % (4 LANES) == 0; f32, with u rounded to X as the separate convolution rounds it
#include "delta.h"
// --- body ---
constexpr int HEAD_ROWS = SIMD_GROUPS * (32 / LANES) * ROWS;
constexpr int CHANNELS = 2 * HK * DK + HV * DV;
constexpr int SHARE = HV / HK;
FM_THREADGROUP_ARRAY(float4, query_memory, DK / 4);
FM_THREADGROUP_ARRAY(float4, key_memory, DK / 4);
FM_THREADGROUP_ARRAY(float, value_memory, HEAD_ROWS);
FM_THREADGROUP_ARRAY(float, squares, SIMD_GROUPS);
threadgroup float* query = (threadgroup float*)query_memory;
threadgroup float* key = (threadgroup float*)key_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint batch = threadgroup_position_in_grid.x / HV;
const uint head = threadgroup_position_in_grid.x % HV;
const uint key_head = head / SHARE;
const uint own_row = (simd_group * (32 / LANES) + lane / LANES) * ROWS;
const uint lane_in_row = lane % LANES;
const device X* row = projected + size_t(batch) * PITCH;

float4 state[ROWS][DK / LANES / 4];
const size_t own_state = size_t(threadgroup_position_in_grid.x) * DV * (DK / 4);
const device float4* state_source = (const device float4*)state_in + own_state;
device float4* state_target = (device float4*)state_out + own_state;
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const uint safe_row = metal::min(own_row + r, uint(DV - 1));
#pragma unroll
  for (int i = 0; i < DK / LANES / 4; i++) {
    state[r][i] = state_source[safe_row * (DK / 4) + i * LANES + lane_in_row];
  }
}

// Channels of this head: DK of q, DK of k, DV of v. The value heads that share a key head compute its channels each
// for itself; the first one writes their new convolution state.
for (uint i = simd_group * 32 + lane; i < 2 * DK + DV; i += SIMD_GROUPS * 32) {
  const bool is_value = i >= 2 * DK;
  const bool owned = is_value || head % SHARE == 0;
  uint channel = (i / DK) * (HK * DK) + key_head * DK + i % DK;
  uint place = (i < DK ? Q_AT : K_AT) + key_head * QK_STEP + i % DK;
  if (is_value) {
    channel = 2 * HK * DK + head * DV + i - 2 * DK;
    place = V_AT + key_head * V_STEP + head % SHARE * DV + i - 2 * DK;
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
  const X newest = row[place];
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

const uint gates = key_head * B_STEP + head % SHARE;
const float time = fm_softplus(float(row[A_AT + gates]) + float(dt_bias[head]));
const float decay = metal::exp(-metal::exp(float(A_log[head])) * time);
const float beta = fm_sigmoid(float(row[B_AT + gates]));

float value[ROWS];
float out[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  value[r] = value_memory[metal::min(own_row + r, uint(DV - 1))];
  out[r] = 0.0f;
}
fm_delta_step<DK, LANES, ROWS>(state, query, key, decay, beta, product, q_scale, k_scale, lane_in_row, value, out);

float sum_of_squares = 0.0f;
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const uint safe_row = own_row + r;
  if (safe_row < DV) {
    if (lane_in_row == 0) {
      sum_of_squares = metal::fma(out[r], out[r], sum_of_squares);
    }
#pragma unroll
    for (int i = 0; i < DK / LANES / 4; i++) {
      state_target[safe_row * (DK / 4) + i * LANES + lane_in_row] = state[r][i];
    }
  }
}
sum_of_squares = simd_sum(sum_of_squares);
if (lane == 0) {
  squares[simd_group] = sum_of_squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float total = 0.0f;
#pragma unroll
for (int i = 0; i < SIMD_GROUPS; i++) {
  total += squares[i];
}
const float scale = 1.0f / metal::sqrt(total / float(DV) + EPS);
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const uint own = own_row + r;
  if (own < DV && lane_in_row == 0) {
    const float gate = float(row[Z_AT + key_head * V_STEP + head % SHARE * DV + own]);
    const float normed = out[r] * scale * float(norm[own]);
    y[(size_t(batch) * HV + head) * DV + own] = static_cast<X>(normed * gate * fm_sigmoid(gate));
  }
}

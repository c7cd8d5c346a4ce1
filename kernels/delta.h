// delta.h: one token of the gated delta rule, on the rows of the state that a lane holds in registers.
// Shared by gated_delta and gated_delta_conv_step.
//
// A row of the state (DK floats) is spread over LANES neighbouring lanes, DK / LANES floats each, in
// pieces of four: lane l holds floats 4 (i LANES + l) .. + 3. A lane holds ROWS such rows.
//
// With the faded state S' = g S, both products need one pass over it and one round of reductions:
//   r = beta (v - S' k),   y = (S' + r k^T) q = S' q + r (k . q),   S = S' + r k^T
// Query and key come as they are, with the scales that normalise them, which the sums factor out.

// softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|). Metal has no log1p: log(1 + e) loses e's low
// bits, and e / ((1 + e) - 1) puts them back (Kahan).
FM_FN float fm_softplus(float x) {
  const float e = metal::exp(-metal::abs(x));
  const float u = 1.0f + e;
  const float log1p = u > 1.0f ? metal::log(u) * (e / (u - 1.0f)) : e;
  return metal::max(x, 0.0f) + log1p;
}

FM_FN float fm_sigmoid(float x) { return 1.0f / (1.0f + metal::exp(-x)); }

template <int LANES>
FM_FN float fm_lane_sum(float value) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask >>= 1) {
    value += simd_shuffle_xor(value, ushort(mask));
  }
  return value;
}

FM_FN float fm_dot4(float4 a, float4 b, float sum) {
  sum = metal::fma(a.x, b.x, sum);
  sum = metal::fma(a.y, b.y, sum);
  sum = metal::fma(a.z, b.z, sum);
  return metal::fma(a.w, b.w, sum);
}

template <int DK, int LANES, int ROWS>
FM_FN void fm_delta_step(
    thread float4 (&state)[ROWS][DK / LANES / 4],
    const threadgroup float* query,
    const threadgroup float* key,
    float decay,
    float beta,
    float key_query,
    float query_scale,
    float key_scale,
    uint lane,
    const thread float (&value)[ROWS],
    thread float (&out)[ROWS]) {
  constexpr int PIECES = DK / LANES / 4;
  const threadgroup float4* q = (const threadgroup float4*)query;
  const threadgroup float4* k = (const threadgroup float4*)key;
  float read[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    read[r] = 0.0f;
    out[r] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const float4 qi = q[i * LANES + lane];
    const float4 ki = k[i * LANES + lane];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float4 s = state[r][i];
      s.x *= decay;
      s.y *= decay;
      s.z *= decay;
      s.w *= decay;
      read[r] = fm_dot4(s, ki, read[r]);
      out[r] = fm_dot4(s, qi, out[r]);
      state[r][i] = s;
    }
  }
  float change[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float residual = metal::fma(-key_scale, fm_lane_sum<LANES>(read[r]), value[r]);
    change[r] = residual * beta;
    out[r] = metal::fma(change[r], key_query, query_scale * fm_lane_sum<LANES>(out[r]));
    change[r] *= key_scale;
  }
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const float4 ki = k[i * LANES + lane];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float4 s = state[r][i];
      s.x = metal::fma(change[r], ki.x, s.x);
      s.y = metal::fma(change[r], ki.y, s.y);
      s.z = metal::fma(change[r], ki.z, s.z);
      s.w = metal::fma(change[r], ki.w, s.w);
      state[r][i] = s;
    }
  }
}

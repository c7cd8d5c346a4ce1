// delta.h: the gated delta rule: tokens prepared by a SIMD group, and one token's step on the rows of the state
// that a lane holds in registers. Shared by gated_delta and gated_delta_conv_step.
//
// A row of the state (DK floats) is spread over LANES neighbouring lanes, DK / LANES floats each, in
// pieces of four: lane l holds floats 4 (i LANES + l) .. + 3. A lane holds ROWS such rows.
//
// With the decayed state S' = g S, both products need one pass over it and one round of reductions:
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

// What a SIMD group prepares of a run of tokens, OWN of them: a lane has DK / 32 floats of each q and k. The body
// loads decay and beta itself: their inputs may be so small that Metal has them in its constant address space.
template <int OWN, int DK>
struct FmTokens {
  float q[OWN][DK / 32];
  float k[OWN][DK / 32];
  float decay[OWN];
  float beta[OWN];
};

// Requests q and k of tokens first, first + STRIDE, ...; past the last one that again.
template <int OWN, int STRIDE, int DK, int HK, typename X>
FM_FN void fm_request_tokens(
    thread FmTokens<OWN, DK>& tokens,
    const device X* queries,
    const device X* keys,
    uint first,
    uint last,
    uint key_head,
    uint lane) {
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const size_t token = metal::min(first + i * STRIDE, last);
    const size_t source = (token * HK + key_head) * DK + lane;
#pragma unroll
    for (int j = 0; j < DK / 32; j++) {
      tokens.q[i][j] = float(queries[source + j * 32]);
      tokens.k[i][j] = float(keys[source + j * 32]);
    }
  }
}

// Stores them as steps first, first + STRIDE, ... below STEPS: q / |q| / sqrt(DK) and k / |k|, and each token's
// decay g, beta and k . q. rate is exp(A_log), shift dt_bias.
template <int OWN, int STRIDE, int DK, int STEPS>
FM_FN void fm_prepare_tokens(
    threadgroup float* query,
    threadgroup float* key,
    threadgroup float* decay,
    threadgroup float* beta,
    threadgroup float* dot,
    const thread FmTokens<OWN, DK>& tokens,
    float rate,
    float shift,
    uint first,
    uint lane) {
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    float q_squares = 0.0f;
    float k_squares = 0.0f;
    float product = 0.0f;
#pragma unroll
    for (int j = 0; j < DK / 32; j++) {
      q_squares = metal::fma(tokens.q[i][j], tokens.q[i][j], q_squares);
      k_squares = metal::fma(tokens.k[i][j], tokens.k[i][j], k_squares);
      product = metal::fma(tokens.q[i][j], tokens.k[i][j], product);
    }
    const float q_scale = 1.0f / (metal::sqrt(simd_sum(q_squares) + 1e-6f) * metal::sqrt(float(DK)));
    const float k_scale = 1.0f / metal::sqrt(simd_sum(k_squares) + 1e-6f);
    product = simd_sum(product) * q_scale * k_scale;
    const uint step = first + i * STRIDE;
    if (step < uint(STEPS)) {
#pragma unroll
      for (int j = 0; j < DK / 32; j++) {
        query[step * DK + j * 32 + lane] = tokens.q[i][j] * q_scale;
        key[step * DK + j * 32 + lane] = tokens.k[i][j] * k_scale;
      }
      if (lane == 0) {
        decay[step] = metal::exp(-rate * fm_softplus(tokens.decay[i] + shift));
        beta[step] = fm_sigmoid(tokens.beta[i]);
        dot[step] = product;
      }
    }
  }
}

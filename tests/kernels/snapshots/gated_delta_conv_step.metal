#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]
FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }
FM_FN float fm_field(uint32_t word, uint32_t mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f
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
template <int OWN, int DK>
struct FmTokens {
  float q[OWN][DK / 32];
  float k[OWN][DK / 32];
  float decay[OWN];
  float beta[OWN];
};
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
[[kernel]] void custom_kernel_flash_moe_gated_delta_conv_step_bd8610561d0c_bfloat16_t_bfloat16_t_bfloat16_t_floatc_floatc_float_bfloat16_t_bfloat16_t_bfloat16_t_float(
  const device bfloat16_t* projected [[buffer(0)]],
  const device bfloat16_t* conv_in [[buffer(1)]],
  const device bfloat16_t* conv_weight [[buffer(2)]],
  const constant float* A_log [[buffer(3)]],
  const constant float* dt_bias [[buffer(4)]],
  const device float* state_in [[buffer(5)]],
  const device bfloat16_t* norm [[buffer(6)]],
  device bfloat16_t* y [[buffer(7)]],
  device bfloat16_t* conv_out [[buffer(8)]],
  device float* state_out [[buffer(9)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
typedef bfloat16_t X;
typedef float RATE;
typedef float SHIFT;
constexpr int PITCH = 456;
constexpr int TAPS = 4;
constexpr int HK = 2;
constexpr int HV = 4;
constexpr int DK = 32;
constexpr int DV = 40;
constexpr int Q_AT = 0;
constexpr int K_AT = 64;
constexpr int QK_STEP = 32;
constexpr int V_AT = 128;
constexpr int Z_AT = 288;
constexpr int V_STEP = 80;
constexpr int B_AT = 448;
constexpr int A_AT = 452;
constexpr int B_STEP = 2;
constexpr float EPS = 1e-06f;
constexpr int LANES = 8;
constexpr int ROWS = 1;
constexpr int SIMD_GROUPS = 16;
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

}

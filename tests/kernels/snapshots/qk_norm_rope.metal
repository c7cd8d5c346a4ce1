#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]
FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }
FM_FN float fm_field(uint32_t word, uint32_t mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f

[[kernel]] void custom_kernel_flash_moe_qk_norm_rope_66723faf6385_bfloat16_t_bfloat16_t_bfloat16_t_float_bfloat16_t_bfloat16_t(
  const device bfloat16_t* projected [[buffer(0)]],
  const device bfloat16_t* q_norm [[buffer(1)]],
  const device bfloat16_t* k_norm [[buffer(2)]],
  const device float* rotation [[buffer(3)]],
  device bfloat16_t* queries [[buffer(4)]],
  device bfloat16_t* keys [[buffer(5)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
typedef bfloat16_t X;
constexpr int PITCH = 768;
constexpr int HQ = 4;
constexpr int HK = 2;
constexpr int D = 64;
constexpr int Q_AT = 0;
constexpr int Q_STEP = 128;
constexpr int K_AT = 512;
constexpr int ROTARY = 16;
constexpr float EPS = 1e-06f;
constexpr int SIMD_GROUPS = 2;
const uint lane = thread_index_in_simdgroup;
const uint token = threadgroup_position_in_grid.x;
const uint head = metal::min(
    threadgroup_position_in_grid.y * SIMD_GROUPS + simdgroup_index_in_threadgroup, uint(HQ + HK - 1));
const bool is_key = head >= HQ;
const uint start = is_key ? K_AT + (head - HQ) * D : Q_AT + head * Q_STEP;
const device X* x = projected + size_t(token) * PITCH + start;
const device X* weight = is_key ? k_norm : q_norm;
const device float* cosine = rotation + size_t(token) * ROTARY;
const device float* sine = cosine + ROTARY / 2;
float squares = 0.0f;
for (uint i = lane; i < D; i += 32) {
  const float value = float(x[i]);
  squares = metal::fma(value, value, squares);
}
const float scale = 1.0f / metal::sqrt(simd_sum(squares) / float(D) + EPS);
device X* target = is_key ? keys + (size_t(token) * HK + head - HQ) * D : queries + (size_t(token) * HQ + head) * D;
for (uint i = lane; i < D; i += 32) {
  float value = float(x[i]) * scale * float(weight[i]);
  if (i < ROTARY) {
    const bool second = i >= ROTARY / 2;
    const uint pair = second ? i - ROTARY / 2 : i;
    const uint other = second ? pair : i + ROTARY / 2;
    const float partner = float(x[other]) * scale * float(weight[other]);
    const float turned = partner * sine[pair];
    value = metal::fma(value, cosine[pair], second ? turned : -turned);
  }
  target[i] = static_cast<X>(value);
}

}

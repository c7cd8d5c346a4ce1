#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]
FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }
FM_FN float fm_field(uint32_t word, uint32_t mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f

[[kernel]] void custom_kernel_flash_moe_moe_combine_0bddd5c6be75_float_floatc_bfloat16_t_bfloat16_tc_bfloat16_t_bfloat16_t(
  const device float* y [[buffer(0)]],
  const constant float* weights [[buffer(1)]],
  const device bfloat16_t* shared [[buffer(2)]],
  const constant bfloat16_t* shared_gate [[buffer(3)]],
  const device bfloat16_t* residual [[buffer(4)]],
  device bfloat16_t* out [[buffer(5)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
typedef bfloat16_t OUT;
constexpr int H = 384;
constexpr int K = 3;
constexpr bool HAS_SHARED = true;
constexpr bool HAS_GATE = true;
constexpr bool HAS_RESIDUAL = true;
const uint column = thread_position_in_grid.x * 4;
const uint token = thread_position_in_grid.y;
if (column < H) {
  const device float4* routed = (const device float4*)(y + size_t(token) * K * H + column);
  float4 sum;
  sum.x = 0.0f;
  sum.y = 0.0f;
  sum.z = 0.0f;
  sum.w = 0.0f;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const float4 value = routed[k * (H / 4)];
    const float weight = float(weights[token * K + k]);
    sum.x = metal::fma(weight, value.x, sum.x);
    sum.y = metal::fma(weight, value.y, sum.y);
    sum.z = metal::fma(weight, value.z, sum.z);
    sum.w = metal::fma(weight, value.w, sum.w);
  }
  float total[4] = {sum.x, sum.y, sum.z, sum.w};
  float open = 1.0f;
  if (HAS_GATE) {
    open = 1.0f / (1.0f + metal::exp(-float(shared_gate[token])));
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const size_t element = size_t(token) * H + column + j;
    if (HAS_SHARED) {
      total[j] = metal::fma(open, float(shared[element]), total[j]);
    }
    if (HAS_RESIDUAL) {
      total[j] += float(residual[element]);
    }
    out[element] = static_cast<OUT>(total[j]);
  }
}

}

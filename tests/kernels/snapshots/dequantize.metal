#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]
FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }
FM_FN float fm_field(uint32_t word, uint32_t mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f

[[kernel]] void custom_kernel_flash_moe_dequantize_065247c0e56e_uint32_t_bfloat16_t_bfloat16_t_uint32_tc_uint32_t_bfloat16_t(
  const device uint32_t* words [[buffer(0)]],
  const device bfloat16_t* scales [[buffer(1)]],
  const device bfloat16_t* biases [[buffer(2)]],
  const constant uint32_t* slots [[buffer(3)]],
  const device uint32_t* place [[buffer(4)]],
  device bfloat16_t* dense [[buffer(5)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
constexpr int BITS = 4;
constexpr int GROUP = 64;
typedef bfloat16_t S;
typedef bfloat16_t X;
constexpr int EACH = 8;
const uint matrix = thread_position_in_grid.y;
const size_t slot = slots[matrix];
const uint count = place[0];
const uint threads = place[1];
const device uint32_t* own_words = words + slot * place[2] + place[4];
const device S* own_scales = scales + slot * place[3] + place[5];
const device S* own_biases = biases + slot * place[3] + place[6];
device X* own = dense + size_t(matrix) * count;
#pragma unroll
for (int j = 0; j < EACH; j++) {
  const uint index = thread_position_in_grid.x + j * threads;
  if (index < count) {
    const uint word = own_words[index / (32 / BITS)];
    const float q = float((word >> (index % (32 / BITS) * BITS)) & ((1u << BITS) - 1u));
    const uint group = index / GROUP;
    own[index] = static_cast<X>(metal::fma(q, float(own_scales[group]), float(own_biases[group])));
  }
}

}

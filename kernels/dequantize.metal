// dequantize.metal: affine-quantised matrices as plain ones, for products of many rows (prompts)
// Math     dense[m, i] = q[i] * scale[i / GROUP] + bias[i / GROUP], of matrix slots[m], rounded once
// FMA      one per weight
// Inputs   words, scales, biases, slots, place
// Outputs  dense
// Shapes   words u32, scales and biases S; slots (M) u32; place (8) u32: weights of a matrix (count), threads in a row
//          of the grid, distance of two matrices in words and in scales, first word, scale and bias of matrix 0; dense
//          (M, count) X
// Threads  grid (count / EACH rounded up, M, 1), threadgroup (256, 1, 1): a thread takes EACH weights
// Traffic  count (BITS / 8 + 2 sizeof S / GROUP) bytes read and count sizeof X written per matrix
// Fused    the choice of matrices, dequantising, rounding
// Assumes  BITS divides 32, GROUP divides the columns. Sizes are no constants: a model has many, and each would compile
// --- body ---
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

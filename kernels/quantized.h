// quantized.h: chunks of affine-quantised rows, unpacked and multiplied. Shared by the matvec kernels.
//
// A chunk is CHUNK consecutive weights of a row (32 or 64): what one lane takes at a time. MLX packs
// weights as one little-endian bit stream, so 32 weights of b bits are exactly b words, for every b.
//
// FMA form: sum_j (q_j s + z) x_j = s sum_j q_j x_j + z sum_j x_j. The sum of x is shared by all rows,
// so each weight costs one fma, and each 32 of them one scale and one bias.
//
// Unpacking without an integer-to-float conversion (a quarter-rate instruction on Hopper): or-ing a
// q < 2^23 into the bits of 2^23 gives the float 2^23 + q exactly; subtracting 2^23 leaves q exactly.
// With SCALED (2, 4 and 8 bits) the field is masked but not shifted down: it reads q 2^(BITS p) for
// position p of its 16 bits, and x was multiplied by 2^(-BITS p) when it was staged. Both are exact.

// Lanes of the threadgroup's copy of x, in floats a chunk: the chunk, then the sum of each 32 of it.
// Padding by 4 floats keeps 16-byte reads of neighbouring lanes in different banks.
#define FM_STRIDE(chunk) ((chunk) + 4)

template <int BITS, int GROUP, int CHUNK, int ROWS, typename S>
struct FmRows {
  uint32_t words[ROWS][CHUNK * BITS / 32];
  S scales[ROWS][CHUNK / 32];
  S biases[ROWS][CHUNK / 32];
};

// Loads chunk number `chunk` of ROWS consecutive rows. Rows past the last repeat the last.
template <int BITS, int GROUP, int CHUNK, int ROWS, typename S, int COLUMNS, bool WIDE>
FM_FN void fm_load_rows(
    thread FmRows<BITS, GROUP, CHUNK, ROWS, S>& rows,
    const device uint32_t* weights,
    const device S* scales,
    const device S* biases,
    uint first_row,
    uint last_row,
    uint chunk) {
  constexpr int WORDS = CHUNK * BITS / 32;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint row = metal::min(first_row + r, last_row);
    const device uint32_t* source = weights + size_t(row) * (COLUMNS / 32 * BITS) + chunk * WORDS;
    if (WIDE) {
#pragma unroll
      for (int i = 0; i < WORDS / 4; i++) {
        const uint4 four = ((const device uint4*)source)[i];
        rows.words[r][4 * i] = four.x;
        rows.words[r][4 * i + 1] = four.y;
        rows.words[r][4 * i + 2] = four.z;
        rows.words[r][4 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        rows.words[r][i] = source[i];
      }
    }
    const size_t group_row = size_t(row) * (COLUMNS / GROUP);
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++) {
      const uint group = (chunk * CHUNK + i * 32) / GROUP;
      rows.scales[r][i] = scales[group_row + group];
      rows.biases[r][i] = biases[group_row + group];
    }
  }
}

// Weights first .. first + 7 of one row's chunk, as floats.
template <int BITS, bool SCALED, int WORDS>
FM_FN void fm_unpack(const thread uint32_t (&words)[WORDS], int first, thread float (&w)[8]) {
  const uint32_t mask = (1u << BITS) - 1u;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int bit = (first + j) * BITS;
    uint32_t field;
    if (SCALED) {
      field = (words[bit / 32] >> (bit & 16)) & (mask << (bit & 15));
    } else {
      field = words[bit / 32] >> (bit & 31);
      if ((bit & 31) + BITS > 32) {
        field |= words[bit / 32 + 1] << (32 - (bit & 31));
      }
      field &= mask;
    }
    w[j] = fm_float(field | 0x4b000000u) - 8388608.0f;
  }
}

FM_FN float fm_dot(const thread float (&w)[8], float4 low, float4 high, float sum) {
  sum = metal::fma(w[0], low.x, sum);
  sum = metal::fma(w[1], low.y, sum);
  sum = metal::fma(w[2], low.z, sum);
  sum = metal::fma(w[3], low.w, sum);
  sum = metal::fma(w[4], high.x, sum);
  sum = metal::fma(w[5], high.y, sum);
  sum = metal::fma(w[6], high.z, sum);
  return metal::fma(w[7], high.w, sum);
}

// Adds the products of weights first .. first + 7 of each row with eight staged values of x to dot.
template <int BITS, int GROUP, int CHUNK, int ROWS, typename S, bool SCALED>
FM_FN void fm_multiply(
    const thread FmRows<BITS, GROUP, CHUNK, ROWS, S>& rows,
    int first,
    float4 low,
    float4 high,
    thread float (&dot)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float w[8];
    fm_unpack<BITS, SCALED>(rows.words[r], first, w);
    dot[r] = fm_dot(w, low, high, dot[r]);
  }
}

// Applies the scales and biases of the chunk's 32 weights number `part`, whose x add up to sum.
template <int BITS, int GROUP, int CHUNK, int ROWS, typename S>
FM_FN void fm_fold(
    const thread FmRows<BITS, GROUP, CHUNK, ROWS, S>& rows,
    int part,
    const thread float (&dot)[ROWS],
    float sum,
    thread float (&total)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float shifted = metal::fma(float(rows.biases[r][part]), sum, total[r]);
    total[r] = metal::fma(float(rows.scales[r][part]), dot[r], shifted);
  }
}

// One SIMD group stages 32 values of x, one a lane: scaled for its position, and their sum.
template <int CHUNK, int SCALED_BITS>
FM_FN void fm_stage(threadgroup float* staged, uint part, uint lane, float value) {
  threadgroup float* chunk = staged + part * 32 / CHUNK * FM_STRIDE(CHUNK);
  const uint offset = part * 32 % CHUNK;
  const float sum = simd_sum(value);
  float scaled = value;
  if (SCALED_BITS > 0) {
    const uint position = lane % (SCALED_BITS > 0 ? 16 / SCALED_BITS : 1);
    scaled = value * fm_float((127u - uint(SCALED_BITS) * position) << 23);
  }
  chunk[offset + lane] = scaled;
  if (lane == 0) {
    chunk[CHUNK + offset / 32] = sum;
  }
}

// Sum over LANES neighbouring lanes (a power of two), in every one of them.
template <int LANES>
FM_FN float fm_lane_sum(float value) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask >>= 1) {
    value += simd_shuffle_xor(value, ushort(mask));
  }
  return value;
}

// quantized.h: chunks of affine-quantised rows, unpacked and multiplied. Shared by the matvec kernels.
//
// A chunk is 32 consecutive weights of a row: what one lane takes at a time. MLX packs weights as one
// little-endian bit stream, so 32 weights of b bits are exactly b words, for every b.
//
// FMA form: sum_j (q_j s + z) x_j = s sum_j q_j x_j + z sum_j x_j. The sum of x is shared by all rows,
// so each weight costs one fma, and each 32 of them one scale and one bias.
//
// Unpacking without an integer-to-float conversion, which GPUs do at a fraction of the rate of an fma: the dialect's
// fm_field makes a float of masked bits, exactly, in a unit of its own; x is staged times 2^FM_STAGED_EXPONENT
// and FM_DOT_SCALE puts the sums right. With SCALED (2, 4 and 8 bits) the field is masked but not shifted down: it
// reads q 2^(BITS p) for position p of its 16 bits, and x is staged times 2^(-BITS p) as well. All of it is exact.

#define FM_CHUNK 32
// The threadgroup's copy of x, in floats per chunk: the chunk, then its sum.
// Padding by 4 floats keeps 16-byte reads of neighbouring lanes in different banks.
#define FM_STRIDE (FM_CHUNK + 4)

template <int BITS, int GROUP, int ROWS, typename S>
struct FmRows {
  uint32_t words[ROWS][BITS];
  S scales[ROWS];
  S biases[ROWS];
};

// Loads chunk number `chunk` of ROWS consecutive rows, WIDTH words at a time. Rows past the last repeat it.
template <int BITS, int GROUP, int ROWS, typename S, int COLUMNS, int WIDTH>
FM_FN void fm_load_rows(
    thread FmRows<BITS, GROUP, ROWS, S>& rows,
    const device uint32_t* weights,
    const device S* scales,
    const device S* biases,
    uint first_row,
    uint last_row,
    uint chunk) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const uint row = metal::min(first_row + r, last_row);
    const device uint32_t* source = weights + size_t(row) * (COLUMNS / 32 * BITS) + chunk * BITS;
    if (WIDTH == 4) {
#pragma unroll
      for (int i = 0; i < BITS / 4; i++) {
        const uint4 four = ((const device uint4*)source)[i];
        rows.words[r][4 * i] = four.x;
        rows.words[r][4 * i + 1] = four.y;
        rows.words[r][4 * i + 2] = four.z;
        rows.words[r][4 * i + 3] = four.w;
      }
    } else if (WIDTH == 2) {
#pragma unroll
      for (int i = 0; i < BITS / 2; i++) {
        const uint2 two = ((const device uint2*)source)[i];
        rows.words[r][2 * i] = two.x;
        rows.words[r][2 * i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < BITS; i++) {
        rows.words[r][i] = source[i];
      }
    }
    const size_t group_row = size_t(row) * (COLUMNS / GROUP);
    const uint group = chunk * FM_CHUNK / GROUP;
    rows.scales[r] = scales[group_row + group];
    rows.biases[r] = biases[group_row + group];
  }
}

// Weights first .. first + 7 of one row's chunk, as floats in fm_field's unit.
template <int BITS, bool SCALED>
FM_FN void fm_unpack(const thread uint32_t (&words)[BITS], int first, thread float (&w)[8]) {
  const uint32_t mask = (1u << BITS) - 1u;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int bit = (first + j) * BITS;
    uint32_t word = words[bit / 32] >> (SCALED ? bit & 16 : bit & 31);
    if (!SCALED && (bit & 31) + BITS > 32) {
      word |= words[bit / 32 + 1] << (32 - (bit & 31));
    }
    w[j] = fm_field(word, SCALED ? mask << (bit & 15) : mask);
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
template <int BITS, int GROUP, int ROWS, typename S, bool SCALED>
FM_FN void fm_multiply(
    const thread FmRows<BITS, GROUP, ROWS, S>& rows,
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

// Applies the scales and biases of a chunk whose x add up to sum.
template <int BITS, int GROUP, int ROWS, typename S>
FM_FN void fm_fold(
    const thread FmRows<BITS, GROUP, ROWS, S>& rows,
    const thread float (&dot)[ROWS],
    float sum,
    thread float (&total)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float shifted = metal::fma(float(rows.biases[r]), sum, total[r]);
    total[r] = metal::fma(float(rows.scales[r]), dot[r] * FM_DOT_SCALE, shifted);
  }
}

// Adds the products of a chunk with its staged x to total.
template <int BITS, int GROUP, int ROWS, typename S, bool SCALED>
FM_FN void fm_add_chunk(
    const thread FmRows<BITS, GROUP, ROWS, S>& rows,
    const threadgroup float* chunk_of_x,
    thread float (&total)[ROWS]) {
  const threadgroup float4* fours_of_x = (const threadgroup float4*)chunk_of_x;
  float dot[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    dot[r] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    fm_multiply<BITS, GROUP, ROWS, S, SCALED>(rows, i * 8, fours_of_x[2 * i], fours_of_x[2 * i + 1], dot);
  }
  fm_fold<BITS, GROUP, ROWS, S>(rows, dot, chunk_of_x[FM_CHUNK], total);
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

// A lane stages values index .. index + 3 of x (index is a multiple of 4): scaled for their positions,
// and eight lanes' sum. All lanes of the SIMD group call it; those past the end have inside = false.
template <int SCALED_BITS>
FM_FN void fm_stage(threadgroup float* staged, uint index, bool inside, float4 value) {
  const float sum = fm_lane_sum<8>((value.x + value.y) + (value.z + value.w));
  const uint positions = 16 / (SCALED_BITS > 0 ? SCALED_BITS : 16);
  const uint unit = 127u + FM_STAGED_EXPONENT;
  value.x *= fm_float((unit - SCALED_BITS * (index % positions)) << 23);
  value.y *= fm_float((unit - SCALED_BITS * ((index + 1) % positions)) << 23);
  value.z *= fm_float((unit - SCALED_BITS * ((index + 2) % positions)) << 23);
  value.w *= fm_float((unit - SCALED_BITS * ((index + 3) % positions)) << 23);
  threadgroup float* chunk = staged + index / FM_CHUNK * FM_STRIDE;
  const uint offset = index % FM_CHUNK;
  if (inside) {
    *(threadgroup float4*)(chunk + offset) = value;
    if (offset == 0) {
      chunk[FM_CHUNK] = sum;
    }
  }
}

// Values of x that each thread of a threadgroup of SIMD_GROUPS stages: requested all at once, so that the
// waits overlap, and stored by fm_store_tile. width <= TILE of them exist.
#define FM_TILE_STEPS(tile, simd_groups) (((tile) + (simd_groups) * 128 - 1) / ((simd_groups) * 128))

template <int TILE, int SIMD_GROUPS, typename X>
FM_FN void fm_request_tile(
    thread float4 (&values)[FM_TILE_STEPS(TILE, SIMD_GROUPS)],
    const device X* x,
    uint width,
    uint simd_group,
    uint lane) {
#pragma unroll
  for (int i = 0; i < FM_TILE_STEPS(TILE, SIMD_GROUPS); i++) {
    const uint index = (i * SIMD_GROUPS + simd_group) * 128 + lane * 4;
    const device X* source = x + (index < width ? index : 0);
    values[i].x = float(source[0]);
    values[i].y = float(source[1]);
    values[i].z = float(source[2]);
    values[i].w = float(source[3]);
  }
}

template <int SCALED_BITS, int TILE, int SIMD_GROUPS>
FM_FN void fm_store_tile(
    threadgroup float* staged,
    const thread float4 (&values)[FM_TILE_STEPS(TILE, SIMD_GROUPS)],
    uint width,
    uint simd_group,
    uint lane) {
#pragma unroll
  for (int i = 0; i < FM_TILE_STEPS(TILE, SIMD_GROUPS); i++) {
    const uint index = (i * SIMD_GROUPS + simd_group) * 128 + lane * 4;
    fm_stage<SCALED_BITS>(staged, index, index < width, values[i]);
  }
}

template <int SCALED_BITS, int TILE, int SIMD_GROUPS, typename X>
FM_FN void fm_stage_tile(threadgroup float* staged, const device X* x, uint width, uint simd_group, uint lane) {
  float4 values[FM_TILE_STEPS(TILE, SIMD_GROUPS)];
  fm_request_tile<TILE, SIMD_GROUPS>(values, x, width, simd_group, lane);
  fm_store_tile<SCALED_BITS, TILE, SIMD_GROUPS>(staged, values, width, simd_group, lane);
}

// As fm_stage_tile, for W (norm * x): stages x times its norm's weights and adds the squares of x to this SIMD group's
// place in squares. The root of their mean is common to a row's products, so fm_rms_scale puts it in at the end.
template <int SCALED_BITS, int TILE, int SIMD_GROUPS, typename X>
FM_FN void fm_stage_normed_tile(
    threadgroup float* staged,
    threadgroup float* squares,
    const device X* x,
    const device X* norm,
    uint width,
    bool first,
    uint simd_group,
    uint lane) {
  float4 values[FM_TILE_STEPS(TILE, SIMD_GROUPS)];
  float4 weights[FM_TILE_STEPS(TILE, SIMD_GROUPS)];
  fm_request_tile<TILE, SIMD_GROUPS>(values, x, width, simd_group, lane);
  fm_request_tile<TILE, SIMD_GROUPS>(weights, norm, width, simd_group, lane);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < FM_TILE_STEPS(TILE, SIMD_GROUPS); i++) {
    if ((i * SIMD_GROUPS + simd_group) * 128 + lane * 4 < width) {
      sum = metal::fma(values[i].x, values[i].x, sum);
      sum = metal::fma(values[i].y, values[i].y, sum);
      sum = metal::fma(values[i].z, values[i].z, sum);
      sum = metal::fma(values[i].w, values[i].w, sum);
    }
    values[i].x *= weights[i].x;
    values[i].y *= weights[i].y;
    values[i].z *= weights[i].z;
    values[i].w *= weights[i].w;
  }
  fm_store_tile<SCALED_BITS, TILE, SIMD_GROUPS>(staged, values, width, simd_group, lane);
  sum = simd_sum(sum);
  if (lane == 0) {
    squares[simd_group] = first ? sum : squares[simd_group] + sum;
  }
}

template <int SIMD_GROUPS, int COLUMNS>
FM_FN float fm_rms_scale(const threadgroup float* squares, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < SIMD_GROUPS; i++) {
    sum += squares[i];
  }
  return 1.0f / metal::sqrt(sum / float(COLUMNS) + eps);
}

// As fm_stage_tile, for W (sigmoid(gate) * x). Four neighbouring values have neighbouring gates; those of each
// HEAD values begin PITCH after those of the HEAD before. first is the tile's place in the row of x.
template <int SCALED_BITS, int TILE, int SIMD_GROUPS, int HEAD, int PITCH, typename X>
FM_FN void fm_stage_gated_tile(
    threadgroup float* staged,
    const device X* x,
    const device X* gate,
    uint width,
    uint first,
    uint simd_group,
    uint lane) {
  float4 values[FM_TILE_STEPS(TILE, SIMD_GROUPS)];
  fm_request_tile<TILE, SIMD_GROUPS>(values, x + first, width, simd_group, lane);
#pragma unroll
  for (int i = 0; i < FM_TILE_STEPS(TILE, SIMD_GROUPS); i++) {
    const uint index = (i * SIMD_GROUPS + simd_group) * 128 + lane * 4;
    const uint place = first + (index < width ? index : 0);
    const device X* source = gate + place / HEAD * PITCH + place % HEAD;
    values[i].x *= 1.0f / (1.0f + metal::exp(-float(source[0])));
    values[i].y *= 1.0f / (1.0f + metal::exp(-float(source[1])));
    values[i].z *= 1.0f / (1.0f + metal::exp(-float(source[2])));
    values[i].w *= 1.0f / (1.0f + metal::exp(-float(source[3])));
  }
  fm_store_tile<SCALED_BITS, TILE, SIMD_GROUPS>(staged, values, width, simd_group, lane);
}

// Adds the products of chunks chunk, chunk + LANES, ... below end to total. x of chunk `first` lies at staged. The
// first chunk's weights were requested into next; each other's are on their way while its predecessor is used.
template <int BITS, int GROUP, int ROWS, int COLUMNS, int WIDTH, int LANES, bool SCALED, typename S>
FM_FN void fm_dot_tile(
    thread FmRows<BITS, GROUP, ROWS, S>& next,
    const device uint32_t* weights,
    const device S* scales,
    const device S* biases,
    uint first_row,
    uint last_row,
    thread uint& chunk,
    uint first,
    uint end,
    const threadgroup float* staged,
    thread float (&total)[ROWS]) {
#pragma unroll 1
  for (; chunk < end; chunk += LANES) {
    const FmRows<BITS, GROUP, ROWS, S> rows = next;
    if (chunk + LANES < COLUMNS / FM_CHUNK) {
      fm_load_rows<BITS, GROUP, ROWS, S, COLUMNS, WIDTH>(
          next, weights, scales, biases, first_row, last_row, chunk + LANES);
    }
    fm_add_chunk<BITS, GROUP, ROWS, S, SCALED>(rows, staged + (chunk - first) * FM_STRIDE, total);
  }
}

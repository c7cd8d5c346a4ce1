#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]
FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }
FM_FN float fm_field(uint32_t word, uint32_t mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f
#define FM_CHUNK 32
#define FM_STRIDE (FM_CHUNK + 4)
template <int BITS, int GROUP, int ROWS, typename S>
struct FmRows {
  uint32_t words[ROWS][BITS];
  S scales[ROWS];
  S biases[ROWS];
};
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
template <int LANES>
FM_FN float fm_lane_sum(float value) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask >>= 1) {
    value += simd_shuffle_xor(value, ushort(mask));
  }
  return value;
}
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
template <int BITS_, int GROUP_, int WIDTH_, typename S_, int WEIGHT_, int SCALES_, int BIASES_>
struct FmPart {
  enum { BITS = BITS_, GROUP = GROUP_, WIDTH = WIDTH_, WEIGHT = WEIGHT_, SCALES = SCALES_, BIASES = BIASES_ };
  typedef S_ S;
};
template <typename PART, int ROWS, int COLUMNS>
FM_FN void fm_load_part(
    thread FmRows<PART::BITS, PART::GROUP, ROWS, typename PART::S>& rows,
    const device uint32_t* record,
    uint first_row,
    uint last_row,
    uint chunk) {
  fm_load_rows<PART::BITS, PART::GROUP, ROWS, typename PART::S, COLUMNS, PART::WIDTH>(
      rows,
      record + PART::WEIGHT,
      (const device typename PART::S*)(record + PART::SCALES),
      (const device typename PART::S*)(record + PART::BIASES),
      first_row,
      last_row,
      chunk);
}
template <
    typename GATE, typename UP, int ROWS, int LANES, int COLUMNS, int TILE, int SIMD_GROUPS, int SCALED_BITS, bool NORM,
    typename X>
FM_FN void fm_gate_up(
    threadgroup float* staged,
    threadgroup float* squares,
    const device X* x,
    const device X* norm,
    const device uint32_t* record,
    uint first_row,
    uint last_row,
    uint simd_group,
    uint lane,
    thread float (&gate)[ROWS],
    thread float (&up)[ROWS]) {
  constexpr bool SCALED = SCALED_BITS > 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    gate[r] = 0.0f;
    up[r] = 0.0f;
  }
  FmRows<GATE::BITS, GATE::GROUP, ROWS, typename GATE::S> gate_next;
  FmRows<UP::BITS, UP::GROUP, ROWS, typename UP::S> up_next;
  uint chunk = lane % LANES;
  if (chunk < COLUMNS / FM_CHUNK) {
    fm_load_part<GATE, ROWS, COLUMNS>(gate_next, record, first_row, last_row, chunk);
    fm_load_part<UP, ROWS, COLUMNS>(up_next, record, first_row, last_row, chunk);
  }
  for (uint tile = 0; tile < COLUMNS; tile += TILE) {
    const uint width = metal::min(uint(TILE), COLUMNS - tile);
    if (tile > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (NORM) {
      fm_stage_normed_tile<SCALED_BITS, TILE, SIMD_GROUPS>(
          staged, squares, x + tile, norm + tile, width, tile == 0, simd_group, lane);
    } else {
      fm_stage_tile<SCALED_BITS, TILE, SIMD_GROUPS>(staged, x + tile, width, simd_group, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 1
    for (; chunk < (tile + width) / FM_CHUNK; chunk += LANES) {
      const FmRows<GATE::BITS, GATE::GROUP, ROWS, typename GATE::S> gate_rows = gate_next;
      const FmRows<UP::BITS, UP::GROUP, ROWS, typename UP::S> up_rows = up_next;
      if (chunk + LANES < COLUMNS / FM_CHUNK) {
        fm_load_part<GATE, ROWS, COLUMNS>(gate_next, record, first_row, last_row, chunk + LANES);
        fm_load_part<UP, ROWS, COLUMNS>(up_next, record, first_row, last_row, chunk + LANES);
      }
      const threadgroup float* chunk_of_x = staged + (chunk - tile / FM_CHUNK) * FM_STRIDE;
      const threadgroup float4* fours_of_x = (const threadgroup float4*)chunk_of_x;
      float gate_dot[ROWS];
      float up_dot[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        gate_dot[r] = 0.0f;
        up_dot[r] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float4 low = fours_of_x[2 * i];
        const float4 high = fours_of_x[2 * i + 1];
        fm_multiply<GATE::BITS, GATE::GROUP, ROWS, typename GATE::S, SCALED>(gate_rows, i * 8, low, high, gate_dot);
        fm_multiply<UP::BITS, UP::GROUP, ROWS, typename UP::S, SCALED>(up_rows, i * 8, low, high, up_dot);
      }
      const float sum = chunk_of_x[FM_CHUNK];
      fm_fold<GATE::BITS, GATE::GROUP, ROWS, typename GATE::S>(gate_rows, gate_dot, sum, gate);
      fm_fold<UP::BITS, UP::GROUP, ROWS, typename UP::S>(up_rows, up_dot, sum, up);
    }
  }
}
template <typename PART, int ROWS, int LANES, int COLUMNS, int SETS, bool SCALED>
FM_FN void fm_down_rows(
    thread FmRows<PART::BITS, PART::GROUP, ROWS, typename PART::S>& next,
    const device uint32_t* record,
    uint first_row,
    uint last_row,
    const threadgroup float* staged,
    uint lane,
    threadgroup float* sums) {
  constexpr int ROWS_OF_A_SET = 32 / LANES * ROWS;
  const uint first_chunk = lane % LANES;
  const uint own_row = lane / LANES * ROWS;
#pragma unroll 1
  for (uint set = 0; set < SETS; set++) {
    float total[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      total[r] = 0.0f;
    }
#pragma unroll 1
    for (uint chunk = first_chunk; chunk < COLUMNS / FM_CHUNK; chunk += LANES) {
      const FmRows<PART::BITS, PART::GROUP, ROWS, typename PART::S> rows = next;
      const bool last = chunk + LANES >= COLUMNS / FM_CHUNK;
      if (!last || set + 1 < SETS) {
        fm_load_part<PART, ROWS, COLUMNS>(
            next, record, first_row + own_row + (last ? set + 1 : set) * ROWS_OF_A_SET, last_row,
            last ? first_chunk : chunk + LANES);
      }
      fm_add_chunk<PART::BITS, PART::GROUP, ROWS, typename PART::S, SCALED>(rows, staged + chunk * FM_STRIDE, total);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float sum = fm_lane_sum<LANES>(total[r]);
      if (first_chunk == 0) {
        sums[set * ROWS_OF_A_SET + own_row + r] = sum;
      }
    }
  }
}
[[kernel]] void custom_kernel_flash_moe_expert_down_combine_911c2742d431_float_uint32_t_uint32_tc_floatc_uint32_t_float_bfloat16_t_bfloat16_t(
  const device float* h [[buffer(0)]],
  const device uint32_t* bank [[buffer(1)]],
  const constant int* bank_shape [[buffer(2)]],
  const constant uint32_t* slots [[buffer(3)]],
  const constant int* slots_shape [[buffer(4)]],
  const constant float* weights [[buffer(5)]],
  const device uint32_t* shared [[buffer(6)]],
  const device float* shared_gate [[buffer(7)]],
  const device bfloat16_t* residual [[buffer(8)]],
  device bfloat16_t* out [[buffer(9)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
typedef bfloat16_t OUT;
constexpr int H = 384;
constexpr int I = 256;
constexpr int SHARED_I = 256;
constexpr int K = 3;
constexpr int RECORD = 41472;
constexpr bool SHARED_EXPERT = true;
constexpr bool SAME_PARTS = true;
constexpr bool HAS_SHARED = false;
typedef float SHARED_X;
constexpr bool HAS_GATE = true;
constexpr int GATE_PITCH = 5;
constexpr int GATE_AT = 4;
constexpr bool HAS_RESIDUAL = true;
constexpr int DOWN_BITS = 4;
constexpr int DOWN_GROUP = 64;
constexpr int DOWN_WIDTH = 4;
typedef bfloat16_t DOWN_S;
typedef float DOWN_B;
constexpr bool DOWN_HAS_BIAS = false;
constexpr int DOWN_WEIGHT = 27648;
constexpr int DOWN_SCALES = 39936;
constexpr int DOWN_BIASES = 40704;
constexpr int DOWN_BIAS = 0;
constexpr int SHARED_DOWN_BITS = 4;
constexpr int SHARED_DOWN_GROUP = 64;
constexpr int SHARED_DOWN_WIDTH = 4;
typedef bfloat16_t SHARED_DOWN_S;
typedef float SHARED_DOWN_B;
constexpr bool SHARED_DOWN_HAS_BIAS = false;
constexpr int SHARED_DOWN_WEIGHT = 27648;
constexpr int SHARED_DOWN_SCALES = 39936;
constexpr int SHARED_DOWN_BIASES = 40704;
constexpr int SHARED_DOWN_BIAS = 0;
constexpr int TILE = 256;
constexpr int SCALED_BITS = 4;
constexpr int SHARED_SCALED_BITS = 4;
constexpr int LANES = 8;
constexpr int ROWS = 2;
constexpr int SETS = 1;
constexpr int SIMD_GROUPS = 4;
constexpr int ROUNDS = 1;
typedef FmPart<DOWN_BITS, DOWN_GROUP, DOWN_WIDTH, DOWN_S, DOWN_WEIGHT, DOWN_SCALES, DOWN_BIASES> DownPart;
typedef FmPart<
    SHARED_DOWN_BITS, SHARED_DOWN_GROUP, SHARED_DOWN_WIDTH, SHARED_DOWN_S, SHARED_DOWN_WEIGHT, SHARED_DOWN_SCALES,
    SHARED_DOWN_BIASES>
    SharedPart;
constexpr int PITCH = TILE / FM_CHUNK * FM_STRIDE;
constexpr int TILE_ROWS = SETS * (32 / LANES) * ROWS;
constexpr int EXPERTS = K + SHARED_EXPERT;
FM_THREADGROUP_ARRAY(float4, staged_memory, SIMD_GROUPS * PITCH / 4);
FM_THREADGROUP_ARRAY(float, sums, EXPERTS * TILE_ROWS);
const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.x;
const uint first_row = threadgroup_position_in_grid.y * TILE_ROWS;
const uint lane_row = first_row + lane / LANES * ROWS;
const uint first_chunk = lane % LANES;
threadgroup float* own = (threadgroup float*)staged_memory + simd_group * PITCH;
for (uint round = 0; round < ROUNDS; round++) {
  const uint expert = round * SIMD_GROUPS + simd_group;
  const bool is_shared = SHARED_EXPERT && expert == K;
  const bool other_parts = is_shared && !SAME_PARTS;
  const uint pair = token * K + metal::min(expert, uint(K - 1));
  const device uint32_t* record = bank + size_t(metal::min(uint(slots[pair]), uint(bank_shape[0] - 1))) * RECORD;
  const device float* row_of_h = h + size_t(pair) * I;
  if (is_shared) {
    record = (const device uint32_t*)shared;
    row_of_h = h + size_t(uint(slots_shape[0])) * K * I + token * SHARED_I;
  }
  FmRows<DOWN_BITS, DOWN_GROUP, ROWS, DOWN_S> next;
  FmRows<SHARED_DOWN_BITS, SHARED_DOWN_GROUP, ROWS, SHARED_DOWN_S> shared_next;
  if (round > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (other_parts) {
    if (first_chunk < SHARED_I / FM_CHUNK) {
      fm_load_part<SharedPart, ROWS, SHARED_I>(shared_next, record, lane_row, H - 1, first_chunk);
    }
    fm_stage_tile<SHARED_SCALED_BITS, TILE, 1>(own, row_of_h, SHARED_I, 0, lane);
  } else if (expert < EXPERTS) {
    if (first_chunk < I / FM_CHUNK) {
      fm_load_part<DownPart, ROWS, I>(next, record, lane_row, H - 1, first_chunk);
    }
    fm_stage_tile<SCALED_BITS, TILE, 1>(own, row_of_h, I, 0, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (other_parts) {
    fm_down_rows<SharedPart, ROWS, LANES, SHARED_I, SETS, (SHARED_SCALED_BITS > 0)>(
        shared_next, record, first_row, H - 1, own, lane, sums + K * TILE_ROWS);
  } else if (expert < EXPERTS) {
    fm_down_rows<DownPart, ROWS, LANES, I, SETS, (SCALED_BITS > 0)>(
        next, record, first_row, H - 1, own, lane, sums + expert * TILE_ROWS);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const uint own_row = lane * SIMD_GROUPS + simd_group;
const uint row = first_row + own_row;
if (own_row < TILE_ROWS && row < H) {
  float value = 0.0f;
#pragma unroll
  for (uint k = 0; k < K; k++) {
    float sum = sums[k * TILE_ROWS + own_row];
    if (DOWN_HAS_BIAS) {
      const uint slot = metal::min(uint(slots[token * K + k]), uint(bank_shape[0] - 1));
      sum += float(((const device DOWN_B*)(bank + size_t(slot) * RECORD + DOWN_BIAS))[row]);
    }
    value = metal::fma(float(weights[token * K + k]), sum, value);
  }
  float open = 1.0f;
  if (HAS_GATE) {
    open = 1.0f / (1.0f + metal::exp(-float(shared_gate[token * GATE_PITCH + GATE_AT])));
  }
  const size_t element = size_t(token) * H + row;
  if (SHARED_EXPERT) {
    value = metal::fma(open, sums[K * TILE_ROWS + own_row], value);
  } else if (HAS_SHARED) {
    value = metal::fma(open, float(((const device SHARED_X*)shared)[element]), value);
  }
  if (HAS_RESIDUAL) {
    value += float(residual[element]);
  }
  out[element] = static_cast<OUT>(value);
}

}

// expert.h: the projections of one expert's record. Shared by expert_gate_up and expert_down_combine, which compute the
// routed experts and the shared one in one launch: their records may differ in layout, quantisation and width.

// Where a quantised matrix lies in a record, in words, and how it is packed.
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

// A lane's share of ROWS rows of gate and up. Whoever calls it does so with the whole threadgroup. With NORM, x is
// staged times norm and its squares are added up, as in fm_stage_normed_tile.
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
  // The first weights are on their way while x is staged; later ones while their predecessors are used.
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

// A SIMD group's outputs of one down projection: SETS times 32/LANES x ROWS rows, into sums. h lies at staged, whole.
// The first set's first weights were requested into next; each other's are on their way while others are used.
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

// matvec_residual.metal: a token times an affine-quantised matrix, plus residual: a mixer's output projection (decode)
// Math     out[t,n] = residual[t,n] + sum_j W[n,j] x[t,j], w = q*scale + bias, x times sigmoid(gate) if HAS_GATE
// FMA      sum_j (q s + z) x = s sum_j q x + z sum_j x: one fma per weight, the sum of x shared by all rows
// Inputs   x, gate, weight, scales, biases, residual
// Outputs  out
// Shapes   x (T, H), gate (T, GATE_PITCH), weight (N, H bits / 32) u32, scales and biases (N, H / G),
//          residual and out (T, N); the gate of x[j] is gate[GATE_AT + j / HEAD * HEAD_PITCH + j % HEAD]
// Threads  grid (32 T, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a SIMD group computes
//          32/LANES x ROWS outputs, LANES lanes per output, each lane taking a chunk of weights at a time
// Traffic  N H (bits + 32/G) / 8 bytes of weights per token; x from threadgroup memory
// Fused    the gate of attention's output, dequantisation, the residual's addition
// Assumes  H % G == 0, HEAD % 4 == 0, rows of 16-byte multiples where WIDTH is 4; f32 sums. An absent gate is not read
#include "quantized.h"
// --- body ---
FM_THREADGROUP_ARRAY(float4, staged_memory, TILE / FM_CHUNK * FM_STRIDE / 4);
threadgroup float* staged = (threadgroup float*)staged_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.x;
const uint row_set = (threadgroup_position_in_grid.y * SIMD_GROUPS + simd_group) * (32 / LANES) + lane / LANES;
const uint first_row = row_set * ROWS;
const device X* row_of_x = x + size_t(token) * H;
const device X* row_of_gate = gate + size_t(token) * GATE_PITCH + GATE_AT;

float total[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  total[r] = 0.0f;
}

FmRows<BITS, GROUP, ROWS, S> next;
uint chunk = lane % LANES;
if (chunk < H / FM_CHUNK) {
  fm_load_rows<BITS, GROUP, ROWS, S, H, WIDTH>(next, weight, scales, biases, first_row, N - 1, chunk);
}

for (uint tile = 0; tile < H; tile += TILE) {
  const uint width = metal::min(uint(TILE), H - tile);
  if (tile > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (HAS_GATE) {
    fm_stage_gated_tile<SCALED_BITS, TILE, SIMD_GROUPS, HEAD, HEAD_PITCH>(
        staged, row_of_x, row_of_gate, width, tile, simd_group, lane);
  } else {
    fm_stage_tile<SCALED_BITS, TILE, SIMD_GROUPS>(staged, row_of_x + tile, width, simd_group, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  fm_dot_tile<BITS, GROUP, ROWS, H, WIDTH, LANES, (SCALED_BITS > 0)>(
      next, weight, scales, biases, first_row, N - 1, chunk, tile / FM_CHUNK, (tile + width) / FM_CHUNK, staged, total);
}

#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const float sum = fm_lane_sum<LANES>(total[r]);
  const uint row = first_row + r;
  if (lane % LANES == 0 && row < N) {
    const size_t element = size_t(token) * N + row;
    out[element] = static_cast<X>(sum + float(residual[element]));
  }
}

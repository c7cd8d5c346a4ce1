// norm_matvec.metal: RMS norm of a token times an affine-quantised matrix: joined projections, or the router (decode)
// Math     y[t,n] = sum_j W[n,j] norm[j] x[t,j] / sqrt(mean_j x[t,j]^2 + EPS), w = q*scale + bias
// FMA      sum_j (q s + z) x = s sum_j q x + z sum_j x: one fma per weight, the sum of x shared by all rows
// Inputs   x, norm, weight, scales, biases
// Outputs  y
// Shapes   x (T, H), norm (H), weight (N, H bits / 32) u32, scales and biases (N, H / G), y (T, N)
// Threads  grid (32 T, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a SIMD group computes
//          32/LANES x ROWS outputs, LANES lanes per output, each lane taking a chunk of weights at a time
// Traffic  N H (bits + 32/G) / 8 bytes of weights per token; x and norm from threadgroup memory
// Fused    norm, dequantisation, as many projections as were joined
// Assumes  H % G == 0, rows of 16-byte multiples where WIDTH is 4; f32 sums
#include "quantized.h"
// --- body ---
FM_THREADGROUP_ARRAY(float4, staged_memory, TILE / FM_CHUNK * FM_STRIDE / 4);
FM_THREADGROUP_ARRAY(float, squares, SIMD_GROUPS);
threadgroup float* staged = (threadgroup float*)staged_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.x;
const uint row_set = (threadgroup_position_in_grid.y * SIMD_GROUPS + simd_group) * (32 / LANES) + lane / LANES;
const uint first_row = row_set * ROWS;
const device X* row_of_x = x + size_t(token) * H;

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
  fm_stage_normed_tile<SCALED_BITS, TILE, SIMD_GROUPS>(
      staged, squares, row_of_x + tile, norm + tile, width, tile == 0, simd_group, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  fm_dot_tile<BITS, GROUP, ROWS, H, WIDTH, LANES, (SCALED_BITS > 0)>(
      next, weight, scales, biases, first_row, N - 1, chunk, tile / FM_CHUNK, (tile + width) / FM_CHUNK, staged, total);
}

const float scale = fm_rms_scale<SIMD_GROUPS, H>(squares, EPS);
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  const float sum = fm_lane_sum<LANES>(total[r]);
  const uint row = first_row + r;
  if (lane % LANES == 0 && row < N) {
    y[size_t(token) * N + row] = static_cast<OUT>(sum * scale);
  }
}

// dequant_matvec.metal: one to eight rows times an affine-quantised matrix (decode)
// Math     y[m,n] = sum_j W[n,j] x[m,j], w = q*scale + bias
// FMA      sum_j (q s + z) x = s sum_j q x + z sum_j x: one fma per weight, the sum of x shared by all rows
// Inputs   x, weight, scales, biases
// Outputs  y
// Shapes   x (M, H), weight (N, H bits / 32) u32, scales and biases (N, H / G), y (M, N)
// Threads  grid (32 M/X_ROWS, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a SIMD group computes
//          32/LANES x ROWS outputs for X_ROWS rows of x, LANES lanes per output, each a chunk of weights at a time
// Traffic  N H (bits + 32/G) / 8 bytes of weights for each X_ROWS rows of x; x from threadgroup memory
// Fused    dequantisation; each weight is unpacked once for X_ROWS rows
// Assumes  H % G == 0, rows of 16-byte multiples where WIDTH is 4; f32 sums
#include "quantized.h"
// --- body ---
constexpr int PITCH = TILE / FM_CHUNK * FM_STRIDE;
FM_THREADGROUP_ARRAY(float4, staged_memory, X_ROWS * PITCH / 4);
threadgroup float* staged = (threadgroup float*)staged_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint first_x = threadgroup_position_in_grid.x * X_ROWS;
const uint last_x = x_shape[0] - 1;
const uint row_set = (threadgroup_position_in_grid.y * SIMD_GROUPS + simd_group) * (32 / LANES) + lane / LANES;
const uint first_row = row_set * ROWS;

float total[X_ROWS][ROWS];
#pragma unroll
for (int m = 0; m < X_ROWS; m++) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    total[m][r] = 0.0f;
  }
}

// The first weights are on their way while x is staged; later ones while their predecessors are used.
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
#pragma unroll
  for (int m = 0; m < X_ROWS; m++) {
    const device X* row_of_x = x + size_t(metal::min(first_x + m, last_x)) * H + tile;
    fm_stage_tile<SCALED_BITS, TILE, SIMD_GROUPS>(staged + m * PITCH, row_of_x, width, simd_group, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll 1
  for (; chunk < (tile + width) / FM_CHUNK; chunk += LANES) {
    const FmRows<BITS, GROUP, ROWS, S> rows = next;
    if (chunk + LANES < H / FM_CHUNK) {
      fm_load_rows<BITS, GROUP, ROWS, S, H, WIDTH>(
          next, weight, scales, biases, first_row, N - 1, chunk + LANES);
    }
    const threadgroup float* chunk_of_x = staged + (chunk - tile / FM_CHUNK) * FM_STRIDE;
    float dot[X_ROWS][ROWS];
#pragma unroll
    for (int m = 0; m < X_ROWS; m++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        dot[m][r] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float w[ROWS][8];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        fm_unpack<BITS, (SCALED_BITS > 0)>(rows.words[r], i * 8, w[r]);
      }
#pragma unroll
      for (int m = 0; m < X_ROWS; m++) {
        const threadgroup float4* fours_of_x = (const threadgroup float4*)(chunk_of_x + m * PITCH);
        const float4 low = fours_of_x[2 * i];
        const float4 high = fours_of_x[2 * i + 1];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          dot[m][r] = fm_dot(w[r], low, high, dot[m][r]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < X_ROWS; m++) {
      const float sum = chunk_of_x[m * PITCH + FM_CHUNK];
      fm_fold<BITS, GROUP, ROWS, S>(rows, dot[m], sum, total[m]);
    }
  }
}

#pragma unroll
for (int m = 0; m < X_ROWS; m++) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = fm_lane_sum<LANES>(total[m][r]);
    const uint row = first_row + r;
    if (lane % LANES == 0 && row < N && first_x + m <= last_x) {
      y[size_t(first_x + m) * N + row] = static_cast<X>(sum);
    }
  }
}

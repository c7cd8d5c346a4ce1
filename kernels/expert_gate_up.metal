// expert_gate_up.metal: gate and up projections of the routed experts and the shared one, with SwiGLU (decode)
// Math     h[p,i] = silu(sum_j Wg[i,j] x[j]) * sum_j Wu[i,j] x[j], for pair p = (token, slot), w = q*scale + bias;
//          with HAS_NORM, x is norm x / sqrt(mean(x^2) + EPS)
// FMA      sum_j (q s + z) x = s sum_j q x + z sum_j x: one fma per weight, the sum of x shared by all rows
// Inputs   x, norm, bank, slots, shared
// Outputs  h
// Shapes   x (T, H), norm (H), bank (S, RECORD) u32, slots (T, K) u32, shared (SHARED_RECORD) u32,
//          h f32: (T K, I), then (T, SHARED_I) with HAS_SHARED
// Threads  grid (32 T (K + shared), SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a SIMD group computes
//          32/LANES x ROWS rows of one expert, LANES lanes per row, each lane taking a chunk of 32 weights at a time
// Traffic  (T K I + T SHARED_I) H 2 (bits + 32/G) / 8 bytes of weights, once; x from threadgroup memory
// Fused    norm, 2 matvecs, activation, the shared expert; the gate and up rows of a lane share each read of x
// Assumes  H % G == 0, parts of a record on 16-byte boundaries; f32 sums. An input that is absent is not read
#include "quantized.h"
#include "expert.h"
// --- body ---
typedef FmPart<GATE_BITS, GATE_GROUP, GATE_WIDTH, GATE_S, GATE_WEIGHT, GATE_SCALES, GATE_BIASES> GatePart;
typedef FmPart<UP_BITS, UP_GROUP, UP_WIDTH, UP_S, UP_WEIGHT, UP_SCALES, UP_BIASES> UpPart;
typedef FmPart<
    SHARED_GATE_BITS, SHARED_GATE_GROUP, SHARED_GATE_WIDTH, SHARED_GATE_S, SHARED_GATE_WEIGHT, SHARED_GATE_SCALES,
    SHARED_GATE_BIASES>
    SharedGatePart;
typedef FmPart<
    SHARED_UP_BITS, SHARED_UP_GROUP, SHARED_UP_WIDTH, SHARED_UP_S, SHARED_UP_WEIGHT, SHARED_UP_SCALES,
    SHARED_UP_BIASES>
    SharedUpPart;
FM_THREADGROUP_ARRAY(float4, staged_memory, TILE / FM_CHUNK * FM_STRIDE / 4);
FM_THREADGROUP_ARRAY(float, squares, SIMD_GROUPS);
threadgroup float* staged = (threadgroup float*)staged_memory;

const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;
const uint experts = uint(slots_shape[1]);
const uint token = threadgroup_position_in_grid.x / (experts + HAS_SHARED);
const uint rank = threadgroup_position_in_grid.x % (experts + HAS_SHARED);
const bool is_shared = HAS_SHARED && rank == experts;
const uint pair = token * experts + rank;
const uint row_set = (threadgroup_position_in_grid.y * SIMD_GROUPS + simd_group) * (32 / LANES) + lane / LANES;
const uint first_row = row_set * ROWS;
const device X* row_of_x = x + size_t(token) * H;

float gate[ROWS];
float up[ROWS];
if (is_shared && !SAME_PARTS) {
  fm_gate_up<SharedGatePart, SharedUpPart, ROWS, LANES, H, TILE, SIMD_GROUPS, SHARED_SCALED_BITS, HAS_NORM>(
      staged, squares, row_of_x, norm, shared, first_row, SHARED_I - 1, simd_group, lane, gate, up);
} else {
  const device uint32_t* record = shared;
  if (!is_shared) {
    record = bank + size_t(metal::min(uint(slots[pair]), uint(bank_shape[0] - 1))) * RECORD;
  }
  fm_gate_up<GatePart, UpPart, ROWS, LANES, H, TILE, SIMD_GROUPS, SCALED_BITS, HAS_NORM>(
      staged, squares, row_of_x, norm, record, first_row, I - 1, simd_group, lane, gate, up);
}

const float scale = HAS_NORM ? fm_rms_scale<SIMD_GROUPS, H>(squares, EPS) : 1.0f;
const uint width = is_shared ? SHARED_I : I;
const size_t start = is_shared ? size_t(uint(slots_shape[0])) * experts * I + token * SHARED_I : size_t(pair) * I;
#pragma unroll
for (int r = 0; r < ROWS; r++) {
  float gate_sum = fm_lane_sum<LANES>(gate[r]) * scale;
  float up_sum = fm_lane_sum<LANES>(up[r]) * scale;
  const uint row = first_row + r;
  if (lane % LANES == 0 && row < width) {
    if (GATE_HAS_BIAS && !is_shared) {
      const device uint32_t* record = bank + size_t(metal::min(uint(slots[pair]), uint(bank_shape[0] - 1))) * RECORD;
      gate_sum += float(((const device GATE_B*)(record + GATE_BIAS))[row]);
    }
    if (UP_HAS_BIAS && !is_shared) {
      const device uint32_t* record = bank + size_t(metal::min(uint(slots[pair]), uint(bank_shape[0] - 1))) * RECORD;
      up_sum += float(((const device UP_B*)(record + UP_BIAS))[row]);
    }
    h[start + row] = gate_sum / (1.0f + metal::exp(-gate_sum)) * up_sum;
  }
}

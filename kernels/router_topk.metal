// router_topk.metal: the K most probable experts of a token, their weights and slots (decode)
// Math     p = softmax(logits); ids = the K largest, largest first, of equals the higher id first; weights = p[ids],
//          divided by their sum if NORMALISE; slots = table[ids] if HAS_TABLE, else ids
// Inputs   logits, table
// Outputs  ids, weights, slots
// Shapes   logits (T, PITCH) f32, the first E of a row, table (E) u32, ids and slots (T, K) u32, weights (T, K) f32
// Threads  grid (32 T, SIMD_GROUPS, 1), threadgroup (32, SIMD_GROUPS, 1): a thread ranks an expert at a time
// Traffic  E logits per token, once
// Fused    softmax, top-K, sort, normalisation, slots
// Assumes  K <= 32, K <= E; f32
// --- body ---
FM_THREADGROUP_ARRAY(float, values, E);
FM_THREADGROUP_ARRAY(float, best, K);
FM_THREADGROUP_ARRAY(uint32_t, chosen, K);
const uint lane = thread_index_in_simdgroup;
const uint thread_number = simdgroup_index_in_threadgroup * 32 + lane;
const uint token = threadgroup_position_in_grid.x;

for (uint expert = thread_number; expert < E; expert += SIMD_GROUPS * 32) {
  values[expert] = logits[size_t(token) * PITCH + expert];
}
// A logit that is NaN stands above all others and is not chosen: its rank names an expert, and all weights are NaN.
if (thread_number < K) {
  best[thread_number] = fm_float(0x7fc00000u);
  chosen[thread_number] = thread_number;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (uint expert = thread_number; expert < E; expert += SIMD_GROUPS * 32) {
  const float own = values[expert];
  uint rank = 0;
#pragma unroll 8
  for (uint other = 0; other < E; other++) {
    const float value = values[other];
    rank += !(value <= own) || (value == own && other > expert) ? 1 : 0;
  }
  if (rank < K) {
    best[rank] = own;
    chosen[rank] = expert;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (simdgroup_index_in_threadgroup == 0) {
  float sum = 0.0f;
  if (NORMALISE) {
    for (uint k = 0; k < K; k++) {
      sum += metal::exp(best[k] - best[0]);
    }
  } else {
    for (uint expert = lane; expert < E; expert += 32) {
      sum += metal::exp(values[expert] - best[0]);
    }
    sum = simd_sum(sum);
  }
  if (lane < K) {
    const uint expert = chosen[lane];
    ids[token * K + lane] = expert;
    weights[token * K + lane] = metal::exp(best[lane] - best[0]) / sum;
    slots[token * K + lane] = HAS_TABLE ? table[expert] : expert;
  }
}

// qk_norm_rope.metal: RMS norm and rotary embedding of each query and key head, out of the joined projections (decode)
// Math     v = weight x / sqrt(mean(x^2) + EPS) for each head; pairs (v[i], v[i + ROTARY/2]) turned by (cos, sin)[i]
// Inputs   projected, q_norm, k_norm, rotation
// Outputs  queries, keys
// Shapes   projected (T, PITCH): query head h at Q_AT + h Q_STEP, key head h at K_AT + h D; q_norm, k_norm (D),
//          rotation (T, ROTARY) f32: cosines, then sines; queries (T, HQ, D), keys (T, HK, D)
// Threads  grid (32 T, SIMD_GROUPS tiles, 1), threadgroup (32, SIMD_GROUPS, 1): a SIMD group takes a head
// Traffic  the heads in and out once
// Fused    two norms, two rotary embeddings, the split of the projections
// Assumes  ROTARY even and at most D; f32, rounded once
// --- body ---
const uint lane = thread_index_in_simdgroup;
const uint token = threadgroup_position_in_grid.x;
const uint head = metal::min(
    threadgroup_position_in_grid.y * SIMD_GROUPS + simdgroup_index_in_threadgroup, uint(HQ + HK - 1));
const bool is_key = head >= HQ;
const uint start = is_key ? K_AT + (head - HQ) * D : Q_AT + head * Q_STEP;
const device X* x = projected + size_t(token) * PITCH + start;
const device X* weight = is_key ? k_norm : q_norm;
const device float* cosine = rotation + size_t(token) * ROTARY;
const device float* sine = cosine + ROTARY / 2;

float squares = 0.0f;
for (uint i = lane; i < D; i += 32) {
  const float value = float(x[i]);
  squares = metal::fma(value, value, squares);
}
const float scale = 1.0f / metal::sqrt(simd_sum(squares) / float(D) + EPS);
device X* target = is_key ? keys + (size_t(token) * HK + head - HQ) * D : queries + (size_t(token) * HQ + head) * D;
for (uint i = lane; i < D; i += 32) {
  float value = float(x[i]) * scale * float(weight[i]);
  if (i < ROTARY) {
    const bool second = i >= ROTARY / 2;
    const uint pair = second ? i - ROTARY / 2 : i;
    const uint other = second ? pair : i + ROTARY / 2;
    const float partner = float(x[other]) * scale * float(weight[other]);
    const float turned = partner * sine[pair];
    value = metal::fma(value, cosine[pair], second ? turned : -turned);
  }
  target[i] = static_cast<X>(value);
}

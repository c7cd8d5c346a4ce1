// moe_combine.metal: weighted sum of the routed outputs, plus gated shared expert, plus residual
// Math     out[t,n] = sum_k w[t,k] y[t,k,n] + sigmoid(g[t]) shared[t,n] + residual[t,n], k from 0 to K-1 in order
// Inputs   y, weights, shared, shared_gate, residual
// Outputs  out
// Shapes   y (T, K, H) f32, weights (T, K), shared (T, H), shared_gate (T, 1), residual (T, H), out (T, H)
// Threads  grid (H / 4 rounded up, T, 1), threadgroup (64, 1, 1): four outputs per thread
// Traffic  (4 K + 2 + 2 + 2) H bytes per token
// Fused    weighting, sum, gate, two additions
// Assumes  H % 4 == 0; f32 sums. An input that is absent is replaced by any other and not read
// --- body ---
const uint column = thread_position_in_grid.x * 4;
const uint token = thread_position_in_grid.y;
if (column < H) {
  const device float4* routed = (const device float4*)(y + size_t(token) * K * H + column);
  // Every product in an fma, the first too: a product and a sum apart might be contracted in one kernel and not
  // in another, and expert_down_combine has to give the same bits.
  float4 sum;
  sum.x = 0.0f;
  sum.y = 0.0f;
  sum.z = 0.0f;
  sum.w = 0.0f;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const float4 value = routed[k * (H / 4)];
    const float weight = float(weights[token * K + k]);
    sum.x = metal::fma(weight, value.x, sum.x);
    sum.y = metal::fma(weight, value.y, sum.y);
    sum.z = metal::fma(weight, value.z, sum.z);
    sum.w = metal::fma(weight, value.w, sum.w);
  }
  float total[4] = {sum.x, sum.y, sum.z, sum.w};
  float open = 1.0f;
  if (HAS_GATE) {
    open = 1.0f / (1.0f + metal::exp(-float(shared_gate[token])));
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const size_t element = size_t(token) * H + column + j;
    if (HAS_SHARED) {
      total[j] = metal::fma(open, float(shared[element]), total[j]);
    }
    if (HAS_RESIDUAL) {
      total[j] += float(residual[element]);
    }
    out[element] = static_cast<OUT>(total[j]);
  }
}

"""Expected results of the kernels, in numpy and float64 from the packed bits, and the inputs of the tests."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from flash_moe_mlx.formats.expert_layout import PROJECTIONS, Quantization, RecordLayout
from flash_moe_mlx.ops.slot_memory import UnifiedSlots

RELATIVE_RMS = {mx.float32: 2e-6, mx.bfloat16: 4e-3, mx.float16: 1e-3}
"""Largest relative RMS, by the dtype of the result."""

REFERENCE_RMS = 1e-5
"""Largest relative RMS between a kernel and a float32 reference: MLX's CPU product adds a row's products one after
the other and is itself up to 5e-6 from the float64 result for rows of thousands."""

DTYPE_NAMES = {mx.uint32: "U32", mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}


def wide(array: mx.array) -> np.ndarray:
    """An array as float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def assert_close(name: str, reference: np.ndarray, result: mx.array, rel_rms: float | None = None) -> None:
    """Fail unless the result is finite and its relative RMS error at most the table's for its dtype."""
    limit = RELATIVE_RMS[result.dtype] if rel_rms is None else rel_rms
    got = wide(result)
    assert got.shape == reference.shape, f"{name}: shape must be {reference.shape}, got {got.shape}"
    assert np.isfinite(got).all(), (
        f"{name}: {np.count_nonzero(~np.isfinite(got))} values were not written or overflowed"
    )
    error = np.sqrt(((got - reference) ** 2).sum() / max((reference**2).sum(), 1e-300))
    assert error <= limit, f"{name}: relative RMS must be at most {limit:g}, got {error:.3g}"


def quantize(weight: mx.array, bits: int, group_size: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """``mx.quantize``, with scales and biases of a dtype."""
    packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    return packed, scales.astype(dtype), biases.astype(dtype)


def dequantize(packed: mx.array, scales: mx.array, biases: mx.array, bits: int) -> np.ndarray:
    """Weights as float64: a row is one little-endian stream of bits."""
    words = np.array(packed)
    stream = np.unpackbits(words.view(np.uint8).reshape(*words.shape[:-1], -1), axis=-1, bitorder="little")
    codes = stream.reshape(*words.shape[:-1], -1, bits) @ (1 << np.arange(bits)).astype(np.float64)
    group_size = codes.shape[-1] // scales.shape[-1]
    return codes * np.repeat(wide(scales), group_size, -1) + np.repeat(wide(biases), group_size, -1)


def make_bank(
    hidden: int,
    width: int,
    slots: int,
    bits: Sequence[int],
    group_sizes: Sequence[int],
    *,
    dtype: mx.Dtype = mx.bfloat16,
    expert_bias: bool = False,
    alter: bool = True,
) -> tuple[UnifiedSlots, dict[str, np.ndarray]]:
    """A bank of random experts, and its weights as float64 by projection ("gate_proj") and bias ("gate_proj.bias").

    Args:
        hidden: H.
        width: I.
        slots: S.
        bits: Bits of gate, up and down; 0 for unquantised.
        group_sizes: Group sizes of gate, up and down.
        dtype: Dtype of scales and biases, or of unquantised weights.
        expert_bias: Give each projection a bias.
        alter: Put a group of zeros, a constant group and extreme scales into each matrix.
    """
    specs, arrays, quantizations, dense = {}, {}, {}, {}
    for projection, bit, group_size in zip(PROJECTIONS, bits, group_sizes, strict=True):
        out, columns = (hidden, width) if projection == "down_proj" else (width, hidden)
        weight = mx.random.normal((slots, out, columns)) * columns**-0.5
        if bit:
            if alter:
                weight[:, 0, :group_size] = 0
                weight[:, out // 2, :group_size] = 0.25
                weight[:, : out // 4] *= 2.0**-10
                if projection == "down_proj":
                    # Many rows, and not of gate or up: one huge value would leave nothing of the others in the error.
                    weight[:, : out // 3] *= 64
            parts = dict(zip(("weight", "scales", "biases"), quantize(weight, bit, group_size, dtype), strict=True))
            dense[projection] = dequantize(*parts.values(), bit)
            quantizations[projection] = Quantization(bit, group_size)
        else:
            parts = {"weight": weight.astype(dtype)}
            dense[projection] = wide(parts["weight"])
            quantizations[projection] = None
        if expert_bias:
            parts["bias"] = mx.random.normal((slots, out)).astype(dtype)
            dense[f"{projection}.bias"] = wide(parts["bias"])
        for part, array in parts.items():
            specs[projection, part] = (DTYPE_NAMES[array.dtype], array.shape[1:])
            arrays[f"{projection}.{part}"] = np.array(mx.contiguous(array).view(mx.uint8)).reshape(slots, -1)
    bank = UnifiedSlots(RecordLayout.contiguous(specs, quantizations), slots)
    for part in bank.layout.parts:
        for slot in range(slots):
            bank.slot(slot)[part.offset : part.offset + part.nbytes] = arrays[part.name][slot].tobytes()
    return bank, dense


def expert_ffn_oracle(x: mx.array, dense: dict[str, np.ndarray], slots: mx.array) -> np.ndarray:
    """(T, K, H) in float64."""

    def project(rows: np.ndarray, projection: str, slot: int) -> np.ndarray:
        y = dense[projection][slot] @ rows
        return y + dense[f"{projection}.bias"][slot] if f"{projection}.bias" in dense else y

    rows, chosen = wide(x), np.array(slots)
    result = np.empty((*chosen.shape, dense["down_proj"].shape[1]))
    for (token, k), slot in np.ndenumerate(chosen):
        gate, up = project(rows[token], "gate_proj", slot), project(rows[token], "up_proj", slot)
        result[token, k] = project(gate / (1 + np.exp(-gate)) * up, "down_proj", slot)
    return result


def gated_delta_oracle(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, a: np.ndarray, b: np.ndarray,
    A_log: np.ndarray, dt_bias: np.ndarray, state: np.ndarray, mask: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(y, state) in float64, straight from the recurrence."""
    batch, steps, k_heads, k_dim = q.shape
    v_heads = v.shape[2]
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) / np.sqrt(k_dim)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    decay = np.exp(-np.exp(A_log) * np.logaddexp(0, a + dt_bias))
    beta = 1 / (1 + np.exp(-b))
    state, y = state.copy(), np.zeros(v.shape)
    for row in range(batch):
        for t in range(steps):
            if mask is not None and not mask[row, t]:
                continue
            for head in range(v_heads):
                key, query = k[row, t, head * k_heads // v_heads], q[row, t, head * k_heads // v_heads]
                faded = state[row, head] * decay[row, t, head]
                change = beta[row, t, head] * (v[row, t, head] - faded @ key)
                state[row, head] = faded + np.outer(change, key)
                y[row, t, head] = state[row, head] @ query
    return y, state


def conv_oracle(x: np.ndarray, state: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(silu of the causal convolution, new state) in float64."""
    steps, taps = x.shape[1], weight.shape[1]
    padded = np.concatenate([state, x], axis=1)
    total = sum(weight[:, j] * padded[:, j : j + steps] for j in range(taps))
    return total / (1 + np.exp(-total)), padded[:, steps:]

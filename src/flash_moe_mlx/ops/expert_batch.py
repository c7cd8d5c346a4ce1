"""SwiGLU feed-forward of one routed expert on the many tokens that chose it: prefill's inner step."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from .backend import use_cpu_kernels, use_kernels
from .dequant_matmul import GROUP_BYTES, experts_at_once
from .numerics import Activation, swiglu
from .quantized import GATHERED_BYTES, has_kernels, lazy_product, pair_bytes, sorted_product
from .slot_memory import ExpertRecords

CPU_ROWS, GPU_ROWS = 512, 8192


def grouped_rows() -> int:
    """Return how many rows of expert outputs may wait for evaluation, or one expert's: bounds a prefill's scratch."""
    return GPU_ROWS if use_kernels() else CPU_ROWS


def expert_ffn_batch(x: mx.array, bank: ExpertRecords, slot: int, activation: Activation | None = None) -> mx.array:
    """Feed-forward of the expert in one slot.

    Computes ``W_d (silu(W_g x) * W_u x)``, plus the expert's own biases where the record has them.

    Args:
        x: Tokens that chose this expert. Shape (M, H).
        bank: Slots of one layer.
        slot: Where the expert's record is.
        activation: In place of SwiGLU, for models with another one.

    Returns:
        Shape (M, H), float32. Sums are float32.

    Cost: reads one record. Reference: Shazeer 2020, arXiv:2002.05202.
    """
    if use_cpu_kernels() and has_kernels(bank.layout, "cpu"):
        from .cpu import experts

        return experts.expert_ffn_batch(x, bank, slot, activation)
    return expert_ffn_batch_reference(x, bank, slot, activation)


def expert_ffn_grouped(
    y: mx.array,
    x: mx.array,
    bank: ExpertRecords,
    slots: Sequence[int],
    pairs: Sequence[np.ndarray],
    k: int,
    activation: Activation | None = None,
) -> mx.array:
    """Feed-forward of a wave of experts, each on all tokens that chose it.

    Args:
        y: Outputs of every (token, rank) pair so far. Shape (T * k, H), float32. Given away: use what is returned.
        x: Tokens. Shape (T, H).
        bank: Slots of one layer.
        slots: Slot of each expert of the wave.
        pairs: For each of them, its pairs as ``token * k + rank``, ascending.
        k: Experts a token.
        activation: In place of SwiGLU.

    Returns:
        y with this wave's pairs, evaluated. Each expert's rows have the bits of ``expert_ffn_batch``.

    Cost: reads one record per expert. On a CPU at most CPU_ROWS pairs, or one expert's, are in scratch at once; on
    a GPU GPU_ROWS pairs, or one expert's, and the dequantised matrices of ``experts_at_once``.
    """
    if use_cpu_kernels() and has_kernels(bank.layout, "cpu"):
        from .cpu import arrays, experts

        mx.eval(y)  # then its memory is written in place: Python's reference keeps MLX from giving it away
        target = arrays.floats(y)
        experts.grouped_ffn(arrays.floats(x), bank, slots, pairs, k, target, activation)
        return y
    if use_kernels():
        return _grouped_products(y, x, bank, slots, pairs, k, activation)
    rows, weight_bytes = 0, 0
    for slot, own in zip(slots, pairs, strict=True):
        y[mx.array(own)] = expert_ffn_batch(x[mx.array(own // k)], bank, slot, activation)
        # A lazy graph over the whole group would hold all its experts' activations and weights at once.
        rows, weight_bytes = rows + len(own), weight_bytes + pair_bytes(bank.layout)
        if rows >= CPU_ROWS or weight_bytes >= GATHERED_BYTES:
            mx.eval(y)
            rows, weight_bytes = 0, 0
    mx.eval(y)
    return y


def _grouped_products(
    y: mx.array,
    x: mx.array,
    bank: ExpertRecords,
    slots: Sequence[int],
    pairs: Sequence[np.ndarray],
    k: int,
    activation: Activation | None,
) -> mx.array:
    """`expert_ffn_grouped` on a GPU: rows sorted by expert, one product per projection for several experts.

    Which experts share a call changes no bits: a row's product is its own.
    """
    at_once = experts_at_once(bank.layout.hidden_size, bank.layout.intermediate_size)
    # What is dequantised by several operations takes more than its float32 weights.
    at_once = max(1, min(at_once, GROUP_BYTES // pair_bytes(bank.layout)))
    for first, last in _runs([len(own) for own in pairs], at_once, grouped_rows()):
        chosen, own = mx.array(slots[first:last], mx.uint32), pairs[first:last]
        index = mx.array(np.repeat(np.arange(len(own), dtype=np.uint32), [len(each) for each in own]))
        rows = np.concatenate(own)
        each = x[mx.array(rows // k)].reshape(len(rows), 1, -1)
        up = _sorted_product(each, bank, "up_proj", chosen, index)
        gate = _sorted_product(each, bank, "gate_proj", chosen, index) if bank.layout.has_gate else up
        # Not "or": an nn.Module without parameters is an empty dict, hence false.
        h = (swiglu if activation is None else activation)(up, gate).astype(x.dtype)
        y[mx.array(rows)] = _sorted_product(h, bank, "down_proj", chosen, index)[:, 0]
        mx.eval(y)
    return y


def _runs(counts: Sequence[int], most_experts: int, most_rows: int) -> Iterator[tuple[int, int]]:
    """Cut experts into runs of at most so many experts and rows, or one expert's: (first, last + 1) of each."""
    first = rows = 0
    for place, count in enumerate(counts):
        if place > first and (place - first == most_experts or rows + count > most_rows):
            yield first, place
            first, rows = place, 0
        rows += count
    if first < len(counts):
        yield first, len(counts)


def _sorted_product(x: mx.array, bank: ExpertRecords, projection: str, slots: mx.array, index: mx.array) -> mx.array:
    """Multiply rows (R, 1, in), sorted by expert, with their experts' projection; float32, (R, 1, out)."""
    quantization = bank.layout.quantization(projection)
    parts = {part.part: bank.part(part.name)[slots] for part in bank.layout.quantized_parts(projection)}
    y = sorted_product(x, parts, quantization, index).astype(mx.float32)
    if f"{projection}.bias" in bank.layout.by_name:
        y = y + bank.part(f"{projection}.bias")[slots][index][:, None].astype(mx.float32)
    return y


def expert_ffn_batch_reference(
    x: mx.array, bank: ExpertRecords, slot: int, activation: Activation | None = None
) -> mx.array:
    """``expert_ffn_batch`` in plain MLX operations."""
    x = x.astype(mx.float32)
    up = _project(x, bank, "up_proj", slot)
    gate = _project(x, bank, "gate_proj", slot) if bank.layout.has_gate else up
    # Not "or": an nn.Module without parameters is an empty dict, hence false.
    return _project((swiglu if activation is None else activation)(up, gate), bank, "down_proj", slot)


def _project(x: mx.array, bank: ExpertRecords, projection: str, slot: int) -> mx.array:
    quantization = bank.layout.quantization(projection)
    parts = {part.part: bank.part(part.name)[slot] for part in bank.layout.quantized_parts(projection)}
    if quantization is None:
        y = x @ parts["weight"].astype(mx.float32).T
    else:
        y = lazy_product(x, parts, quantization)
    if f"{projection}.bias" in bank.layout.by_name:
        y = y + bank.part(f"{projection}.bias")[slot].astype(mx.float32)
    return y

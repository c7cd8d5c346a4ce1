"""SwiGLU feed-forward of one routed expert on the many tokens that chose it: the inner step of prefill."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from .backend import use_cpu_kernels, use_kernels
from .dequant_matmul import GROUP_BYTES, dequantizes, experts_at_once
from .dequantize import dense_experts, has_kernel
from .numerics import Activation, swiglu
from .quantized import GATHERED_BYTES, grouped_product, has_kernels, lazy_product, pair_bytes, sorted_product
from .slot_memory import ExpertRecords

CPU_ROWS, GPU_ROWS = 512, 8192
RUNS_AHEAD = 2
"""Number of grouped products that a GPU may have before it at a time."""

_SMALL = 2  # bytes of a dtype whose dequantised weights fit twice in what products reserve


def grouped_rows() -> int:
    """Return the maximum number of unevaluated output rows; at least one expert's. It bounds a prefill's scratch."""
    return RUNS_AHEAD * GPU_ROWS if use_kernels() else CPU_ROWS


def expert_ffn_batch(x: mx.array, bank: ExpertRecords, slot: int, activation: Activation | None = None) -> mx.array:
    """Compute the feed-forward of the expert in one slot.

    Computes ``W_d (silu(W_g x) * W_u x)``, plus the expert's own biases if the record has them.

    Args:
        x: Tokens that chose this expert. Shape (M, H).
        bank: Slots of one layer.
        slot: Slot of the expert's record.
        activation: Activation instead of SwiGLU, for models with another one.

    Returns:
        The expert's outputs. Shape (M, H), float32. Sums are float32.

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
    """Compute the feed-forward of a group of experts, each on all tokens that chose it.

    Args:
        y: Outputs of every (token, rank) pair so far. Shape (T * k, H), float32. Consumed: use the returned array.
        x: Tokens. Shape (T, H).
        bank: Slots of one layer.
        slots: Slot of each expert of the group.
        pairs: Each expert's pairs as ``token * k + rank``, ascending.
        k: Number of experts per token.
        activation: Activation instead of SwiGLU.

    Returns:
        y including this group's pairs, evaluated. Each expert's rows have the bits of ``expert_ffn_batch``.

    Cost: reads one record per expert. Scratch holds at most CPU_ROWS pairs, or one expert's, on a CPU; on a GPU it
    holds pairs and dequantised matrices of two runs, each of GPU_ROWS pairs or one expert's, and ``experts_at_once``.
    """
    if use_cpu_kernels() and has_kernels(bank.layout, "cpu"):
        from .cpu import arrays, experts

        mx.eval(y)  # evaluated, so that it is written in place: Python's reference keeps MLX from donating the buffer
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
    """Run `expert_ffn_grouped` on a GPU: rows sorted by expert, one product per projection for several experts.

    The choice of experts that share a call changes no bits: each row's product is independent.
    """
    at_once = experts_at_once(bank.layout.hidden_size, bank.layout.intermediate_size)
    # What is dequantised by several operations takes more than its float32 weights.
    at_once = max(1, min(at_once, GROUP_BYTES // pair_bytes(bank.layout)))
    counts = [len(own) for own in pairs]
    starts = np.cumsum([0, *counts]).tolist()
    # Uploaded once for all runs.
    rows = mx.array(np.concatenate(pairs).astype(np.uint32))
    expert_of_row = mx.array(np.repeat(np.arange(len(pairs), dtype=np.uint32), counts))
    all_slots, tokens = mx.array(slots, mx.uint32), rows // k
    dense = [bank.layout.quantization(name) for name, _ in bank.layout.quantizations] if dequantizes() else []
    # What is dequantised by several operations, or to float32, fits once in what products reserve.
    ahead = x.dtype.size <= _SMALL and all(map(has_kernel, dense))
    before: mx.array | None = None
    for first, last in _runs(counts, at_once, GPU_ROWS):
        own = slice(starts[first], starts[last])
        chosen, index = all_slots[first:last], expert_of_row[own] - first
        each = x[tokens[own]][:, None]
        up = _sorted_product(each, bank, "up_proj", chosen, index)
        gate = _sorted_product(each, bank, "gate_proj", chosen, index) if bank.layout.has_gate else up
        # Not "or": an nn.Module without parameters is an empty dict, hence false.
        h = (swiglu if activation is None else activation)(up, gate).astype(x.dtype)
        result = _sorted_product(h, bank, "down_proj", chosen, index)[:, 0]
        y[rows[own]] = result
        mx.async_eval(y)
        # The next run is built while this one is computed, and waits for the one before, whose memory it takes.
        if not ahead:
            mx.eval(y)
        elif before is not None:
            mx.eval(before)
        before = result
    mx.eval(y)
    return y


def _runs(counts: Sequence[int], most_experts: int, most_rows: int) -> Iterator[tuple[int, int]]:
    """Split experts into runs within both limits, at least one expert each: (first, last + 1) of each run."""
    first = rows = 0
    for place, count in enumerate(counts):
        if place > first and (place - first == most_experts or rows + count > most_rows):
            yield first, place
            first, rows = place, 0
        rows += count
    if first < len(counts):
        yield first, len(counts)


def _sorted_product(x: mx.array, bank: ExpertRecords, projection: str, slots: mx.array, index: mx.array) -> mx.array:
    """Multiply rows (R, 1, in), sorted by expert, with their experts' projection; returns (R, 1, out), float32."""
    quantization = bank.layout.quantization(projection)
    if dequantizes() and has_kernel(quantization):
        y = grouped_product(x, dense_experts(bank, projection, slots, x.dtype), index).astype(mx.float32)
    else:
        parts = {part.part: bank.part(part.name)[slots] for part in bank.layout.quantized_parts(projection)}
        y = sorted_product(x, parts, quantization, index).astype(mx.float32)
    if f"{projection}.bias" in bank.layout.by_name:
        y = y + bank.part(f"{projection}.bias")[slots][index][:, None].astype(mx.float32)
    return y


def expert_ffn_batch_reference(
    x: mx.array, bank: ExpertRecords, slot: int, activation: Activation | None = None
) -> mx.array:
    """Compute ``expert_ffn_batch`` in plain MLX operations."""
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

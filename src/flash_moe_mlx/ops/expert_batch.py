"""SwiGLU feed-forward of one routed expert on the many tokens that chose it: prefill's inner step."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .backend import use_cpu_kernels
from .dequant_matmul import dequantized_bytes, waiting_bytes
from .numerics import Activation, swiglu
from .quantized import has_kernels, lazy_product
from .slot_memory import ExpertBank

GROUPED_ROWS = 512
"""Rows of expert outputs that may wait for evaluation: bounds the scratch of a prefill."""


def expert_ffn_batch(x: mx.array, bank: ExpertBank, slot: int, activation: Activation | None = None) -> mx.array:
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
    bank: ExpertBank,
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

    Cost: reads one record an expert. At most GROUPED_ROWS pairs, or one expert's, are in scratch at once; where experts
    are dequantised, ``waiting_bytes`` and one expert.
    """
    if use_cpu_kernels() and has_kernels(bank.layout, "cpu"):
        from .cpu import arrays, experts

        mx.eval(y)  # then its memory is written in place: Python's reference keeps MLX from giving it away
        target = arrays.floats(y)
        experts.grouped_ffn(arrays.floats(x), bank, slots, pairs, k, target, activation)
        return y
    own_bytes = dequantized_bytes(bank.layout.hidden_size, bank.layout.intermediate_size)
    rows, weight_bytes = 0, 0
    for slot, own in zip(slots, pairs, strict=True):
        y[mx.array(own)] = expert_ffn_batch(x[mx.array(own // k)], bank, slot, activation)
        # A lazy graph over the whole wave would hold all its experts' activations and weights at once.
        rows, weight_bytes = rows + len(own), weight_bytes + own_bytes
        if rows >= GROUPED_ROWS or (own_bytes and weight_bytes >= waiting_bytes(own_bytes)):
            mx.eval(y)
            rows, weight_bytes = 0, 0
    mx.eval(y)
    return y


def expert_ffn_batch_reference(
    x: mx.array, bank: ExpertBank, slot: int, activation: Activation | None = None
) -> mx.array:
    """``expert_ffn_batch`` in plain MLX operations."""
    x = x.astype(mx.float32)
    gate = _project(x, bank, "gate_proj", slot)
    up = _project(x, bank, "up_proj", slot)
    # Not "or": an nn.Module without parameters is an empty dict, hence false.
    return _project((swiglu if activation is None else activation)(up, gate), bank, "down_proj", slot)


def _project(x: mx.array, bank: ExpertBank, projection: str, slot: int) -> mx.array:
    quantization = bank.layout.quantization(projection)
    parts = {part.part: bank.part(part.name)[slot] for part in bank.layout.quantized_parts(projection)}
    if quantization is None:
        y = x @ parts["weight"].astype(mx.float32).T
    else:
        y = lazy_product(x, parts, quantization)
    if f"{projection}.bias" in bank.layout.by_name:
        y = y + bank.part(f"{projection}.bias")[slot].astype(mx.float32)
    return y

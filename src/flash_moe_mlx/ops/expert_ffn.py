"""SwiGLU feed-forward of the routed experts, read from a bank of records."""

from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from flash_moe_mlx.bank import ExpertBank


def project_reference(x: mx.array, bank: "ExpertBank", projection: str, slots: mx.array) -> mx.array:
    """Multiply one row for each (token, slot) pair with that slot's projection.

    Args:
        x: Shape (T, 1 or K, 1, in), float32.
        bank: Slots of one layer.
        projection: "gate_proj", "up_proj" or "down_proj".
        slots: Shape (T, K), uint32.

    Returns:
        Shape (T, K, 1, out), float32.

    Only what has to be converted to float32 is copied: of the pairs when there are fewer pairs than
    slots, else of all slots. Either way each pair is a product of its own, so the bits are the same.
    """
    quantization = bank.layout.quantization(projection)
    names = ("weight",) if quantization is None else ("weight", "scales", "biases")
    parts = [bank.part(f"{projection}.{name}") for name in names]
    index = slots
    if slots.size <= bank.num_slots and (quantization is not None or parts[0].dtype != mx.float32):
        flat = slots.reshape(-1)
        parts = [part[flat] for part in parts]
        index = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
    if quantization is None:
        y = mx.gather_mm(x, parts[0].astype(mx.float32).swapaxes(-1, -2), rhs_indices=index)
    else:
        weight, scales, biases = parts
        y = mx.gather_qmm(
            x,
            weight,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            rhs_indices=index,
            transpose=True,
            group_size=quantization.group_size,
            bits=quantization.bits,
        )
    if f"{projection}.bias" in bank.layout.by_name:
        y = y + bank.part(f"{projection}.bias")[slots].astype(mx.float32)[..., None, :]
    return y


def expert_ffn_reference(x: mx.array, bank: "ExpertBank", slots: mx.array) -> mx.array:
    """``expert_ffn`` in plain MLX operations."""
    rows = x.astype(mx.float32)[:, None, None, :]
    gate = project_reference(rows, bank, "gate_proj", slots)
    up = project_reference(rows, bank, "up_proj", slots)
    return project_reference(gate * mx.sigmoid(gate) * up, bank, "down_proj", slots).squeeze(2)


def expert_ffn(x: mx.array, bank: "ExpertBank", slots: mx.array) -> mx.array:
    """SwiGLU feed-forward of the K routed experts of each token.

    Computes ``W_d (silu(W_g x) * W_u x)`` for each slot, plus the experts' own biases where the record
    has them. Quantised weights are affine, ``w = q * scale + bias``.

    Args:
        x: Hidden states. Shape (T, H), float32, bfloat16 or float16.
        bank: Slots of one layer.
        slots: Slot of each token's routed experts. Shape (T, K), uint32.

    Returns:
        Per-expert outputs, shape (T, K, H), float32. Sums are float32. Each (token, slot) pair is
        computed on its own: its bits depend on no other pair.

    Cost: reads T * K records. Reference: Shazeer 2020, arXiv:2002.05202.
    """
    return expert_ffn_reference(x, bank, slots)

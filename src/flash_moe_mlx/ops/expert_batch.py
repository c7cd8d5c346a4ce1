"""SwiGLU feed-forward of one routed expert on the many tokens that chose it: prefill's inner step."""

import mlx.core as mx

from ..bank import ExpertBank
from .backend import use_cpu_kernels
from .expert_ffn import Activation, swiglu


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
    if use_cpu_kernels():
        from .cpu import experts

        return experts.expert_ffn_batch(x, bank, slot, activation)
    return expert_ffn_batch_reference(x, bank, slot, activation)


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
    weight = bank.part(f"{projection}.weight")[slot]
    if quantization is None:
        y = x @ weight.astype(mx.float32).T
    else:
        y = mx.quantized_matmul(
            x,
            weight,
            bank.part(f"{projection}.scales")[slot].astype(mx.float32),
            bank.part(f"{projection}.biases")[slot].astype(mx.float32),
            transpose=True,
            group_size=quantization.group_size,
            bits=quantization.bits,
        )
    if f"{projection}.bias" in bank.layout.by_name:
        y = y + bank.part(f"{projection}.bias")[slot].astype(mx.float32)
    return y

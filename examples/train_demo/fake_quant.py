"""MLX's affine 4-bit rounding in PyTorch: training sees it in its last part, so that the 4-bit model answers alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

GROUP = 64


def fake_quantize(weight: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Return the values that ``mlx.core.quantize`` keeps of a weight, with scales and biases rounded to bfloat16.

    Args:
        weight: Shape (..., n), n a multiple of 64.
        bits: Bits a weight.

    Returns:
        The rounded weight, same shape and dtype.
    """
    groups = weight.detach().float().unflatten(-1, (-1, GROUP))
    top, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    low_is_edge = low.abs() > top.abs()
    scale = ((top - low) / (2**bits - 1)).clamp_min(1e-7)
    scale = torch.where(low_is_edge, scale, -scale)
    edge = torch.where(low_is_edge, low, top)
    steps = torch.round(edge / scale)
    scale = torch.where(steps != 0, edge / steps, scale)
    bias = torch.where(steps != 0, edge, torch.zeros_like(edge))
    codes = torch.round((groups - bias) / scale).clamp(0, 2**bits - 1)
    scale, bias = scale.bfloat16().float(), bias.bfloat16().float()
    return (codes * scale + bias).flatten(-2).to(weight.dtype)


def quantized_parameters(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """Return the parameters that mlx-lm's conversion of this architecture quantises, with their bits."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.shape[-1] % GROUP == 0 and "conv1d" not in name:
            yield parameter, 8 if ".mlp.gate." in name or "shared_expert_gate" in name else 4


@contextmanager
def quantized(model: torch.nn.Module) -> Iterator[None]:
    """Run with rounded weights; on leaving, the exact ones are back. Gradients pass straight through."""
    with torch.no_grad():
        exact = [(parameter, parameter.data) for parameter, _ in quantized_parameters(model)]
        for parameter, bits in list(quantized_parameters(model)):
            parameter.data = fake_quantize(parameter.data, bits)
    try:
        yield
    finally:
        for parameter, data in exact:
            parameter.data = data

"""Dense matrices that other tools quantised in formats unknown to MLX's layers, dequantised while loading.

Block FP8 (``weight_scale_inv``) and NVFP4 (``weight_scale_2``, ``weight_global_scale``) become bfloat16, as in mlx-lm,
where its models know the format. This takes two and four times their size in memory; experts are streamed unchanged.
"""

from collections.abc import Mapping

import mlx.core as mx

from ..formats.expert_layout import Quantization
from ..ops.quantized import dequantize

WORKSPACE = 8
"""Bytes that dequantising takes per byte of the result: float32 weights, scales, products, and the input."""

_NVFP4_FACTORS = ("weight_scale_2", "weight_global_scale")
_UNREAD = ("input_scale", "input_global_scale")


def dequantised(stored: Mapping[str, mx.array]) -> tuple[dict[str, mx.array], bool]:
    """Replace tensors that other tools quantised by lazy bfloat16 weights.

    Args:
        stored: Dense tensors by stored name, lazy.

    Returns:
        Tensors by name, and whether any was replaced.
    """
    result = dict(stored)
    for name in stored:
        module, _, part = name.rpartition(".")
        if part == "weight_scale_inv" and _is_bytes(stored.get(f"{module}.weight")):
            parts = {"weight": result[f"{module}.weight"], "weight_scale_inv": result.pop(name)}
            result[f"{module}.weight"] = dequantize(parts, Quantization(8, 128, "fp8"), mx.bfloat16)
        elif part in _NVFP4_FACTORS and _is_bytes(stored.get(f"{module}.weight_scale")):
            packed = result.pop(f"{module}.weight_packed", result.get(f"{module}.weight"))
            if packed is None:
                continue
            parts = {
                "weight": packed.view(mx.uint32),
                "scales": result.pop(f"{module}.weight_scale"),
                part: result.pop(name).reshape(()),
            }
            weight = dequantize(parts, Quantization(4, 16, f"nvfp4 with {part}"))
            result[f"{module}.weight"] = weight.astype(mx.bfloat16)
            for unread in _UNREAD:
                result.pop(f"{module}.{unread}", None)
    return result, len(result) < len(stored)


def _is_bytes(value: mx.array | None) -> bool:
    return value is not None and value.dtype == mx.uint8

"""Dense matrices that other tools quantised in formats unknown to MLX's layers, dequantised while loading.

Block FP8 (``weight_scale_inv``) and NVFP4 (``weight_scale_2``, ``weight_global_scale``) become bfloat16, as in mlx-lm,
where its models know the format. This takes two and four times their size in memory; experts are streamed unchanged.
AWQ's and GPTQ's (``qweight``) become MLX's affine ones, as in mlx-lm.
"""

from collections.abc import Mapping

import mlx.core as mx

from ..formats.checkpoint import Checkpoint
from ..formats.expert_layout import Quantization
from ..formats.repacking import REPACKED_PARTS
from ..ops.quantized import dequantize
from ..ops.repacking import affine_part, is_in_order, out_of_order

WORKSPACE = 8
"""Bytes that dequantising takes per byte of the result: float32 weights, scales, products, and the input."""

_NVFP4_FACTORS = ("weight_scale_2", "weight_global_scale")
_UNREAD = ("input_scale", "input_global_scale")


def dequantised(stored: Mapping[str, mx.array], packing: str | None = None) -> tuple[dict[str, mx.array], bool]:
    """Replace tensors that other tools quantised by lazy bfloat16 weights, or by MLX's affine parts.

    Args:
        stored: Dense tensors by stored name, lazy.
        packing: AWQ's or GPTQ's order by config.json, or None.

    Returns:
        Tensors by name, and whether any was replaced.
    """
    result = dict(stored)
    for name in stored:
        module, _, part = name.rpartition(".")
        if part == "qweight" and packing is not None:
            own = {p: result.pop(f"{module}.{p}") for p in (*REPACKED_PARTS, "scales") if f"{module}.{p}" in result}
            result |= {f"{module}.{p}": affine_part(p, own, packing) for p in ("weight", "scales", "biases")}
            continue
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
    return result, any(result.get(name) is not value for name, value in stored.items())


def check_loadable(checkpoint: Checkpoint) -> None:
    """Refuse checkpoints that must be packed first, or whose dense matrices have groups of inputs from anywhere.

    Raises:
        UnsupportedModelError: If so.
    """
    checkpoint.require_streamable()
    check_group_order(checkpoint)


def check_group_order(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError if a dense matrix of GPTQ has groups of inputs from anywhere. Reads ``g_idx``."""
    orders = [info for name, info in checkpoint.dense.items() if name.endswith(".g_idx")]
    for path in {info.path for info in orders}:
        stored = mx.load(str(path))
        for name in (info.name for info in orders if info.path == path):
            if not is_in_order(stored[name], checkpoint.dense[name.removesuffix("g_idx") + "scales"].shape[0]):
                raise out_of_order(name)


def _is_bytes(value: mx.array | None) -> bool:
    return value is not None and value.dtype == mx.uint8

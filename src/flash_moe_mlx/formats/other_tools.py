"""Translates the ``quantization_config`` of tools other than MLX into MLX's section, as mlx-lm does."""

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedModelError
from .repacking import AWQ, GPTQ, GPTQ_V2
from .safetensors_header import brief

_COMPRESSED_TENSORS = {
    "nvfp4-pack-quantized": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "mxfp4-pack-quantized": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "pack-quantized": {"group_size": 32, "bits": 4, "mode": "int4"},
}
_MODELOPT = {"NVFP4": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}
_ADVICE = 'Use an unquantised checkpoint, or one that "mlx_lm.convert" made.'


def packing_method(section: Any) -> str | None:
    """Return the order in which AWQ or GPTQ packed weights into words; None for other tools.

    Raises:
        UnsupportedModelError: If it is an order that isn't supported, or inputs are out of order.
    """
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    if method == "awq":
        kind = section.get("version", "gemm")
        if isinstance(kind, str) and kind.lower() == "gemm":
            return AWQ
    elif method == "gptq":
        kind = section.get("checkpoint_format", "gptq")
        if section.get("is_marlin_format"):
            kind = "marlin"
        elif section.get("desc_act"):
            kind = "desc_act, which gives each group inputs from anywhere"
        elif kind in ("gptq", "gptq_v2"):
            return GPTQ if kind == "gptq" else GPTQ_V2
    else:
        return None
    raise UnsupportedModelError(
        f"[config.json] {method} weights must be in the order of AutoAWQ's gemm or of GPTQ without desc_act, got "
        f"{brief(kind)}. Use another checkpoint of this model."
    )


def mlx_section(section: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the equivalent ``quantization`` section; None if only the tensors tell what is quantised.

    Raises:
        UnsupportedModelError: If the method isn't supported.
    """
    method = section.get("quant_method", section.get("quant_algo"))
    match method:
        case "mxfp4":
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        case "mxfp8":
            return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
        case "fp8":
            return None
        case "awq" | "gptq":
            return {"group_size": section.get("group_size", 128), "bits": section.get("bits", 4)}
        case "compressed-tensors":
            kind = section.get("format")
            if isinstance(kind, str) and kind in _COMPRESSED_TENSORS:
                return _COMPRESSED_TENSORS[kind]
            method = f"compressed-tensors, format {kind}"
        case "modelopt" | "NVFP4":
            nested = section.get("quantization", section)
            algorithm = nested.get("quant_algo") if isinstance(nested, Mapping) else None
            if isinstance(algorithm, str) and algorithm in _MODELOPT:
                return _MODELOPT[algorithm]
            method = f"modelopt, {algorithm}"
        case _:
            pass
    raise UnsupportedModelError(
        f"[config.json] quantization_config must be MLX's, mxfp4, mxfp8, fp8, awq, gptq, compressed-tensors' or "
        f"modelopt's, got method {brief(method)}. {_ADVICE}"
    )

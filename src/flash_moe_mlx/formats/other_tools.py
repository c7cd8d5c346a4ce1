"""Translates the ``quantization_config`` of tools other than MLX into MLX's section, as mlx-lm does."""

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedModelError
from .safetensors_header import brief

_COMPRESSED_TENSORS = {
    "nvfp4-pack-quantized": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "mxfp4-pack-quantized": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "pack-quantized": {"group_size": 32, "bits": 4, "mode": "int4"},
}
_MODELOPT = {"NVFP4": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}
_ADVICE = 'Use an unquantised checkpoint, or one that "mlx_lm.convert" made.'


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
        f"[config.json] quantization_config must be MLX's, mxfp4, mxfp8, fp8, compressed-tensors' or modelopt's, "
        f"got method {brief(method)}. {_ADVICE}"
    )

"""Weights that AWQ and GPTQ packed into words in orders of their own, as MLX's affine parts are computed from them.

Both store ``w = (q - zero) * scale`` in groups along the inputs, as matrices with inputs first:

- AWQ (AutoAWQ's "gemm"): qweight [in, out / 8] and qzeros [in / G, out / 8], eight outputs per word.
- GPTQ: qweight [in * bits / 32, out], inputs in order; qzeros [in / G, out * bits / 32], outputs in order, minus one in
  the first version of the format; g_idx [in], the group of each input.

scales are [in / G, out] in both. Checkpoints in these forms can't be streamed: `pack` rewrites them without loss.
"""

from collections.abc import Mapping

from ..errors import CorruptError, MissingTensorError, UnsupportedModelError
from .schemes import FLOAT_DTYPES

AWQ, GPTQ, GPTQ_V2 = "awq", "gptq", "gptq_v2"
"""The methods: orders of words, and for GPTQ whether zeros are stored minus one."""

REPACKED_PARTS = ("qweight", "qzeros", "g_idx")
"""Tensors of a module besides its scales."""

_BITS = {AWQ: (4,), GPTQ: (2, 4, 8), GPTQ_V2: (2, 4, 8)}
_AGAIN = "Download the checkpoint again."


def affine_parts(
    where: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], method: str | None
) -> dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Return (dtype, shape, names of the tensors it is computed from) of each affine part of a matrix.

    Args:
        where: Beginning of messages.
        tensors: (dtype, shape) of the stored tensors by name; integers are "U32".
        method: One of the methods above; None if config.json names none.

    Raises:
        MissingTensorError: If a tensor is absent.
        CorruptError: If their shapes or dtypes contradict each other.
        UnsupportedModelError: If config.json names no method, or other bits are packed.
    """
    if method is None:
        raise UnsupportedModelError(
            f"[{where}] quantization_config must name awq or gptq, got {', '.join(sorted(tensors))} without it. "
            "Restore config.json."
        )
    if absent := [name for name in ("qweight", "qzeros", "scales") if name not in tensors]:
        raise MissingTensorError(f"[{where}] must have qweight, qzeros and scales, got no {absent[0]}. {_AGAIN}")
    (words, weight), (zero_words, zeros), (dtype, scales) = (tensors[n] for n in ("qweight", "qzeros", "scales"))
    groups, outputs = scales if len(scales) == 2 else (0, 0)
    bits = zeros[1] * 32 // outputs if outputs and len(zeros) == 2 else 0
    sound = (words, zero_words) == ("U32", "U32") and dtype in FLOAT_DTYPES and len(weight) == 2 and groups > 0
    if bits not in _BITS[method] and sound and bits > 0:
        raise UnsupportedModelError(
            f"[{where}] must have {' or '.join(map(str, _BITS[method]))} bits in {method}'s order, got {bits}. "
            "Use another checkpoint of this model."
        )
    inputs = (weight[0] if method == AWQ else weight[0] * 32 // bits) if sound and bits else 0
    expected = {"qzeros": (groups, outputs * bits // 32)}
    expected["qweight"] = (inputs, outputs * bits // 32) if method == AWQ else (inputs * bits // 32, outputs)
    order = tensors.get("g_idx")
    alike = all(tensors[name][1] == shape for name, shape in expected.items())
    if not inputs or inputs % groups or not alike or (order and order != ("U32", (inputs,))) or set(tensors) - {
        *REPACKED_PARTS, "scales"
    }:  # fmt: skip
        got = ", ".join(f"{name} {kind} {shape}" for name, (kind, shape) in sorted(tensors.items()))
        raise CorruptError(f"[{where}] must have qweight, qzeros and scales of one matrix, got {got}. {_AGAIN}")
    per_group = (outputs, groups)
    return {
        "weight": ("U32", (outputs, inputs * bits // 32), ("qweight", "scales", *(["g_idx"] if order else []))),
        "scales": (dtype, per_group, ("scales",)),
        "biases": (dtype, per_group, ("qzeros", "scales")),
    }

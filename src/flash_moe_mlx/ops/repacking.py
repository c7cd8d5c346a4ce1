"""MLX's affine parts from the words of AWQ and GPTQ, as mlx-lm computes them: the same codes, scales and zeros.

`formats.repacking` describes the tensors.
"""

from collections.abc import Mapping

import mlx.core as mx

from ..errors import UnsupportedModelError
from ..formats.repacking import AWQ, GPTQ
from ..formats.safetensors_header import brief

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of eight outputs in AWQ's words."""


def affine_part(part: str, tensors: Mapping[str, mx.array], method: str) -> mx.array:
    """Compute one affine part of a matrix, lazily.

    Args:
        part: "weight", "scales" or "biases".
        tensors: The stored tensors that the part is computed from, by name.
        method: The order of the words, one of `formats.repacking`'s.

    Returns:
        Packed weights (out, in * bits / 32), uint32; scales or biases (out, in / G) in the dtype of the scales. Biases
        are rounded to it once, as in mlx-lm.
    """
    scales = tensors["scales"]
    if part == "scales":
        return mx.contiguous(scales.T)
    if part == "weight":
        words = tensors["qweight"].view(mx.uint32)
        return _packed(_codes(words, 4, method).T) if method == AWQ else mx.contiguous(words.T)
    words = tensors["qzeros"].view(mx.uint32)
    bits = 32 * words.shape[1] // scales.shape[1]
    zeros = _codes(words, bits, method)
    if method == GPTQ:  # stored minus one, modulo their bits
        zeros = (zeros + 1) & (2**bits - 1)
    return mx.contiguous((-zeros.astype(mx.float32) * scales).astype(scales.dtype).T)


def is_in_order(order: mx.array, groups: int) -> mx.array:
    """Return whether each input's group (``g_idx``) is that of its place, as MLX needs it."""
    return (order == mx.arange(order.size) // (order.size // groups)).all()


def out_of_order(name: str) -> UnsupportedModelError:
    """Return the error for a ``g_idx`` that isn't in order, whatever config.json says."""
    return UnsupportedModelError(
        f"[{brief(name)}] must give each group inputs in order, got another order (desc_act). Use another checkpoint "
        "of this model."
    )


def _codes(words: mx.array, bits: int, method: str) -> mx.array:
    places = mx.array(_AWQ_PLACES if method == AWQ else tuple(range(32 // bits)), mx.uint32)
    return ((words[..., None] >> (bits * places)) & (2**bits - 1)).reshape(words.shape[0], -1)


def _packed(codes: mx.array) -> mx.array:
    """Pack codes of 4 bits (out, in) into MLX's words."""
    words = codes.reshape(codes.shape[0], -1, 8) << (4 * mx.arange(8, dtype=mx.uint32))
    return words.sum(-1).astype(mx.uint32)

"""Bits and group size of each module, from config.json and the tensors' shapes, checked against each other.

config.json's ``quantization`` holds a default and one entry a module that differs from it (or false where it is
not quantised). The default is what the conversion was asked for, not what each tensor got: mlx-lm infers a module
without an entry from its tensors, and so does this. An entry that contradicts the tensors is an error.

Only affine quantisation is read: weight U32 [out, in * bits / 32], scales and biases [out, in / G], all with a
leading E for stacked experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError, MissingTensorError, UnsupportedModelError
from .expert_layout import Quantization
from .safetensors_header import brief

FLOAT_DTYPES = ("F16", "BF16", "F32")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

_AFFINE_DEFAULTS = {"bits": 4, "group_size": 64}  # mlx.core.quantize's
_ADVICE = 'Use an unquantised checkpoint, or one that "mlx_lm.convert" made with its default mode, affine.'
_AGAIN = "Download the checkpoint again, or convert it again."


@dataclass(frozen=True, slots=True)
class Stored:
    """dtype and shape of one tensor as stored: a whole one, or one expert's share of it."""

    dtype: str
    shape: tuple[int, ...]


class QuantizationSettings:
    """What config.json says of quantisation: the default, and modules that differ.

    Attributes:
        default: Bits and group size asked for, or None.
        overrides: By mlx-lm's module path; None where a module is said to be unquantised.
    """

    def __init__(self, config: Mapping[str, Any]):
        """Raises UnsupportedModelError for another mode or method than affine, CorruptError for nonsense."""
        section = config.get("quantization")
        if section is None:
            section = _hugging_face_section(config)
        self.default: Quantization | None = None
        self.overrides: dict[str, Quantization | None] = {}
        if section is None:
            return
        if not isinstance(section, dict):
            raise CorruptError(f"[config.json] quantization must be an object, got {brief(section)}. {_AGAIN}")
        self.default = _entry("quantization", section, {})
        for path, entry in section.items():
            if entry is True:
                self.overrides[path] = self.default
            elif entry is False:
                self.overrides[path] = None
            elif isinstance(entry, dict):
                self.overrides[path] = _entry(path, entry, section)

    def resolve(
        self, name: str, path: str, tensors: Mapping[str, Stored], in_features: int | None, *, exact: bool
    ) -> Quantization | None:
        """Quantisation of one module.

        Args:
            name: Of the module, for messages.
            path: Of the module in mlx-lm's naming, as config.json has it.
            tensors: Its "weight", and "scales" and "biases" where it has them.
            in_features: Width of its input, or None where it is not known.
            exact: Whether ``in_features`` is certain; otherwise config.json's entry goes before it, and it is dropped
                where shapes contradict it.

        Raises:
            MissingTensorError: If scales or biases are absent.
            CorruptError: If shapes, dtypes, ``in_features`` and config.json contradict each other.
            UnsupportedModelError: If the tensors are of another quantisation than affine.
        """
        weight, scales, biases = (tensors.get(part) for part in ("weight", "scales", "biases"))
        stated = path in self.overrides
        override = self.overrides.get(path)
        if weight is None:
            raise MissingTensorError(f"[{name}] must have a weight, got scales or biases alone. {_AGAIN}")
        if scales is None and biases is None:
            if weight.dtype == "U32":
                raise MissingTensorError(
                    f"[{name}] must have scales and biases to its packed weights, got none. {_AGAIN}"
                )
            if stated and override is not None:
                raise CorruptError(f"[{name}] must have scales, as config.json says, got none. {_AGAIN}")
            return None
        if scales is not None and (scales.dtype not in FLOAT_DTYPES or weight.dtype != "U32"):
            raise UnsupportedModelError(
                f"[{name}] must be of affine quantisation, got {weight.dtype} weights with {scales.dtype} scales"
                f"{_mode_of(scales)}. {_ADVICE}"
            )
        if scales is None or biases is None:
            absent = "scales" if scales is None else "biases"
            raise MissingTensorError(f"[{name}] must have both scales and biases, got no {absent}. {_AGAIN}")
        if stated and override is None:
            raise CorruptError(f"[{name}] must be unquantised, as config.json says, got scales. {_AGAIN}")
        candidates = _candidates(name, weight, scales, biases)
        if in_features is not None:
            fits = [q for q in candidates if q.bits * in_features == 32 * weight.shape[-1]]
            if not fits and exact:
                raise CorruptError(
                    f"[{name}] must have {in_features} inputs, got weight {weight.shape} and scales "
                    f"{scales.shape}. {_AGAIN}"
                )
            if exact:
                candidates = fits
        if override is not None:
            if override not in candidates:
                raise CorruptError(
                    f"[{name}] must be {_text(override)}, as config.json says, got weight {weight.shape} and "
                    f"scales {scales.shape}, which is {' or '.join(map(_text, candidates))}. {_AGAIN}"
                )
            return override
        if in_features is not None:
            candidates = fits or candidates
        if self.default in candidates:
            return self.default
        same_group = [q for q in candidates if self.default and q.group_size == self.default.group_size]
        if len(same_group or candidates) != 1:
            raise CorruptError(
                f"[{name}] must have its bits and group size in config.json's quantization, got shapes that "
                f"are {' or '.join(map(_text, candidates))}. Add an entry for {path}."
            )
        return (same_group or candidates)[0]


def mlx_name(name: str) -> str:
    """The name mlx-lm's qwen3_5_moe gives a stored tensor: under ``language_model.``."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name if name.startswith("language_model.") else f"language_model.{name}"


def _candidates(name: str, weight: Stored, scales: Stored, biases: Stored) -> list[Quantization]:
    """All (bits, group size) that the shapes allow: they give only the product of the two."""
    if (biases.dtype, biases.shape) != (scales.dtype, scales.shape):
        raise CorruptError(
            f"[{name}] scales and biases must be alike, got {scales.dtype} {scales.shape} and {biases.dtype} "
            f"{biases.shape}. {_AGAIN}"
        )
    if len(weight.shape) < 2 or weight.shape[:-1] != scales.shape[:-1]:
        raise CorruptError(
            f"[{name}] weight and scales must have the same rows, got {weight.shape} and {scales.shape}. {_AGAIN}"
        )
    groups = scales.shape[-1]
    candidates = [
        Quantization(bits, size)
        for bits in BITS
        for size in GROUP_SIZES
        if groups > 0 and bits * size * groups == 32 * weight.shape[-1]
    ]
    if not candidates:
        raise CorruptError(
            f"[{name}] must be of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, got weight {weight.shape} "
            f"and scales {scales.shape}. {_AGAIN}"
        )
    return candidates


def _entry(path: str, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> Quantization:
    mode = entry.get("mode", defaults.get("mode", "affine"))
    if mode != "affine":
        raise UnsupportedModelError(
            f"[config.json] quantization of {brief(path)} must be affine, got {brief(mode)}. {_ADVICE}"
        )
    # mlx_lm.convert's mixed recipes write a null group size, and mean the mode's own, not the section's.
    own = {key: _AFFINE_DEFAULTS[key] if entry[key] is None else entry[key] for key in _AFFINE_DEFAULTS if key in entry}
    bits, group_size = (own.get(key, defaults.get(key)) for key in ("bits", "group_size"))
    if type(bits) is not int or type(group_size) is not int:
        raise CorruptError(
            f"[config.json] quantization of {brief(path)} must give bits and group_size, got {brief(bits)} and "
            f"{brief(group_size)}. {_AGAIN}"
        )
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise UnsupportedModelError(
            f"[config.json] quantization of {brief(path)} must be of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or "
            f"128, got {brief(bits)} in groups of {brief(group_size)}. {_ADVICE}"
        )
    return Quantization(bits, group_size)


def _hugging_face_section(config: Mapping[str, Any]) -> Any:
    """``quantization_config``: MLX's copy of its own section, or another tool's method, which is refused."""
    text = config.get("text_config")
    section = config.get("quantization_config")
    if section is None and isinstance(text, dict):
        section = text.get("quantization_config")
    if not isinstance(section, dict):
        return section
    method = section.get("quant_method", section.get("quant_algo"))
    if method is None and {"bits", "group_size"} <= section.keys():
        return section
    raise UnsupportedModelError(
        f"[config.json] quantization_config must be MLX's, got method {brief(method)}. {_ADVICE}"
    )


def _mode_of(scales: Stored) -> str:
    return " (mxfp4, nvfp4 or mxfp8)" if scales.dtype == "U8" else ""


def _text(quantization: Quantization) -> str:
    return f"{quantization.bits} bits in groups of {quantization.group_size}"

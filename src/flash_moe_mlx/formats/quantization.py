"""Bits and group size of each module, from config.json and the tensors' shapes, checked against each other.

config.json's ``quantization`` holds a default and one entry for each module that differs from it (false if it is
not quantised). The default states what the conversion was asked for, not what each tensor got. The quantisation of a
module without an entry is inferred from its tensors, as in mlx-lm. An entry that contradicts the tensors is an error.

`schemes` has the modes and their tensors, which all have a leading E for stacked experts.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, CorruptError, MissingTensorError, UnsupportedModelError
from .expert_layout import Quantization
from .other_tools import mlx_section, packing_method
from .safetensors_header import brief
from .schemes import AFFINE, FLOAT_DTYPES, SCHEMES, Scheme, matching, modes_in_words, part_names

_ADVICE = 'Use an unquantised checkpoint, or one that "mlx_lm.convert" made.'
_AGAIN = "Download the checkpoint again, or convert it again."


@dataclass(frozen=True, slots=True)
class Stored:
    """dtype and shape of one tensor as stored: a whole one, or one expert's share of it."""

    dtype: str
    shape: tuple[int, ...]


class QuantizationSettings:
    """Quantisation according to config.json: the default, and modules that differ.

    Attributes:
        default: Bits and group size asked for, or None.
        packing: Order in which AWQ or GPTQ packed the weights; None for other tools.
    """

    def __init__(self, config: Mapping[str, Any]):
        """Parse config.json. Raises UnsupportedModelError for unknown modes and methods, CorruptError for bad ones."""
        section = config.get("quantization")
        self.packing: str | None = None
        if section is None:
            section, self.packing = _hugging_face_section(config)
        self.default: Quantization | None = None
        self._entries: dict[str, bool | dict[str, Any]] = {}
        self._aliases: dict[str, str] = {}
        if section is None:
            return
        if not isinstance(section, dict):
            raise CorruptError(f"[config.json] quantization must be an object, got {brief(section)}. {_AGAIN}")
        self.default = _entry("quantization", section, partial=False)
        # Entries are parsed with their modules: those of skipped modules may have any mode.
        self._entries = {path: entry for path, entry in section.items() if isinstance(entry, bool | dict)}
        self._aliases = {_bare(path): path for path in self._entries}

    def stated(self, *paths: str) -> tuple[str | None, Quantization | None]:
        """Return the path of a module's entry in config.json, or None, and its quantisation.

        mlx-lm finds an entry only under its own path of the module. Conversions write others: the hub's, or one without
        the prefixes "model." and "language_model.". Those only decide between quantisations that the shapes allow.

        Args:
            paths: The module's paths, mlx-lm's own and as stored.

        Raises:
            UnsupportedModelError: If the entry has an unknown mode.
            CorruptError: If the entry is invalid.
        """
        path = next((path for path in paths if path in self._entries), None) or self._aliases.get(_bare(paths[0]))
        if path is None:
            return None, None
        entry = self._entries[path]
        if isinstance(entry, bool):
            return path, self.default if entry else None
        try:
            return path, _entry(path, entry, partial=True)
        except CheckpointError:
            if path in paths:
                raise
            return None, None  # mlx-lm would not look at it

    def resolve(
        self, name: str, paths: Sequence[str], tensors: Mapping[str, Stored], in_features: int | None, *, exact: bool
    ) -> Quantization | None:
        """Return the quantisation of one module.

        Args:
            name: The module's name, for messages.
            paths: The module's possible paths in config.json, mlx-lm's first.
            tensors: Its "weight", and the other parts of its quantisation if it has any.
            in_features: Width of its input, or None if unknown.
            exact: Whether ``in_features`` is certain. Otherwise config.json's entry takes precedence, and it is ignored
                if shapes contradict it.

        Raises:
            MissingTensorError: If a part of the quantisation is absent.
            CorruptError: If shapes, dtypes, ``in_features`` and config.json contradict each other.
            UnsupportedModelError: If the tensors have an unknown mode.
        """
        parts = {part: tensors[part] for part in part_names() if part in tensors}
        weight = parts.get("weight")
        found, override = self.stated(*paths)
        certain = found in paths
        stated = found is not None and certain
        if weight is None:
            raise MissingTensorError(f"[{name}] must have a weight, got {' and '.join(parts)} alone. {_AGAIN}")
        if len(parts) == 1:
            if weight.dtype == "U32":
                raise MissingTensorError(f"[{name}] must have scales to its packed weights, got none. {_AGAIN}")
            if stated and override is not None:
                raise CorruptError(f"[{name}] must have scales, as config.json says, got none. {_AGAIN}")
            return None
        schemes = _schemes(name, parts, {q.mode for q in (override, self.default) if q})
        if stated and override is None:
            raise CorruptError(f"[{name}] must be unquantised, as config.json says, got scales. {_AGAIN}")
        candidates = _candidates(name, schemes, parts)
        if in_features is not None:
            fits = [q for q in candidates if q.scheme.width(weight.shape[-1], q.bits) == in_features]
            if not fits and exact:
                raise CorruptError(f"[{name}] must have {in_features} inputs, got {_shapes(parts)}. {_AGAIN}")
            if exact:
                candidates = fits
        likely = (in_features is not None and fits) or candidates
        if not certain and override not in [q.stated for q in likely]:
            override = None
        if override is not None:
            own = [q for q in candidates if q.stated == override]
            if not own:
                raise CorruptError(
                    f"[{name}] must be {override}, as config.json says, got {_shapes(parts)}, which is "
                    f"{' or '.join(map(str, candidates))}. {_AGAIN}"
                )
            return own[0]
        if in_features is not None:
            candidates = fits or candidates
        if default := [q for q in candidates if q.stated == self.default]:
            return default[0]
        same_group = [
            q
            for q in candidates
            if self.default and (q.stated.mode, q.group_size) == (self.default.mode, self.default.group_size)
        ]
        if len(same_group or candidates) != 1:
            raise CorruptError(
                f"[{name}] must have its bits and group size in config.json's quantization, got shapes that "
                f"are {' or '.join(map(str, candidates))}. Add an entry for {paths[0]}."
            )
        return (same_group or candidates)[0]


def mlx_name(name: str) -> str:
    """Return the name under ``language_model.`` that mlx-lm's qwen3_5_moe gives a stored tensor."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name if name.startswith("language_model.") else f"language_model.{name}"


def _bare(path: str) -> str:
    """Return a module's path without the prefixes in which namings differ."""
    while (shorter := path.removeprefix("language_model.").removeprefix("model.")) != path:
        path = shorter
    return path


def _schemes(name: str, parts: Mapping[str, Stored], stated: Collection[str]) -> list[Scheme]:
    """Return the modes whose parts have these names and dtypes."""
    dtypes = {part: stored.dtype for part, stored in parts.items()}
    if found := matching(dtypes, stated):
        return found
    for scheme in SCHEMES.values():
        absent = [part for part in scheme.parts if part not in parts]
        if absent and scheme.accepts(dtypes | {part: scheme.parts[part][0] for part in absent}):
            raise MissingTensorError(
                f"[{name}] must have {', '.join(scheme.parts)}, got no {' and no '.join(absent)}. {_AGAIN}"
            )
    got = ", ".join(f"{part} {dtype}" for part, dtype in dtypes.items())
    raise UnsupportedModelError(f"[{name}] must be of {modes_in_words()} quantisation, got {got}. {_ADVICE}")


def _candidates(name: str, schemes: Sequence[Scheme], parts: Mapping[str, Stored]) -> list[Quantization]:
    """Return all quantisations that the shapes allow: they only give the product of bits and group size."""
    weight = parts["weight"]
    scheme = schemes[0]
    others = [parts[part] for part in scheme.group_parts]
    scales = others[0]
    if any(other.shape != scales.shape for other in others) or len(_float_dtypes(others)) > 1:
        raise CorruptError(f"[{name}] {' and '.join(scheme.group_parts)} must be alike, got {_shapes(parts)}. {_AGAIN}")
    rows = weight.shape[:-1] if scheme.block_rows == 1 else scales.shape[:-1]
    if len(weight.shape) < 2 or rows != scales.shape[:-1]:
        raise CorruptError(f"[{name}] weight and scales must have the same rows, got {_shapes(parts)}. {_AGAIN}")
    shapes = {part: stored.shape for part, stored in parts.items()}
    candidates = [
        Quantization(bits, size, scheme.mode)
        for scheme in schemes
        for bits in scheme.bits
        for size in scheme.group_sizes
        if scheme.fits(shapes, bits, size)
    ]
    if not candidates:
        sizes = " or ".join(f"{scheme.mode}, {scheme.sizes_in_words}" for scheme in schemes)
        raise CorruptError(f"[{name}] must be {sizes}, got {_shapes(parts)}. {_AGAIN}")
    return candidates


def _float_dtypes(parts: Iterable[Stored]) -> set[str]:
    return {part.dtype for part in parts if part.dtype in FLOAT_DTYPES}


def _shapes(parts: Mapping[str, Stored]) -> str:
    return " and ".join(f"{name} {stored.dtype} {stored.shape}" for name, stored in parts.items())


def _entry(path: str, entry: Mapping[str, Any], *, partial: bool) -> Quantization:
    """Return the quantisation of an entry of config.json.

    As in mlx-lm, values that a module's own entry (``partial``) leaves out or sets to null are the mode's defaults, not
    the section's, and the mode defaults to affine.
    """
    mode = entry.get("mode", AFFINE.mode)
    scheme = SCHEMES.get(mode) if isinstance(mode, str) else None
    if scheme is None or scheme.base is not None:
        raise UnsupportedModelError(
            f"[config.json] quantization of {brief(path)} must be {modes_in_words()}, got {brief(mode)}. {_ADVICE}"
        )
    bits, group_size = (
        default if (partial and key not in entry) or (key in entry and entry[key] is None) else entry.get(key)
        for key, default in zip(("bits", "group_size"), scheme.default, strict=True)
    )
    if type(bits) is not int or type(group_size) is not int:
        raise CorruptError(
            f"[config.json] quantization of {brief(path)} must give bits and group_size, got {brief(bits)} and "
            f"{brief(group_size)}. {_AGAIN}"
        )
    if not scheme.allows(bits, group_size):
        raise UnsupportedModelError(
            f"[config.json] quantization of {brief(path)} must be of {scheme.sizes_in_words}, got {brief(bits)} in "
            f"groups of {brief(group_size)}. {_ADVICE}"
        )
    return Quantization(bits, group_size, scheme.mode)


def _hugging_face_section(config: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return ``quantization_config``, MLX's own copy or another tool's, in MLX's form; and AWQ's or GPTQ's order."""
    text = config.get("text_config")
    section = config.get("quantization_config")
    if section is None and isinstance(text, dict):
        section = text.get("quantization_config")
    if not isinstance(section, dict):
        return section, None
    own = {"bits", "group_size"} <= section.keys() and not {"quant_method", "quant_algo"} & section.keys()
    return (section, None) if own else (mlx_section(section), packing_method(section))

"""Reads config.json and generation_config.json, decodes them as mlx-lm does, and checks values before use.

mlx-lm's rules apply: transformers' tagged floats are floats, generation_config.json's end tokens take precedence over
config.json's, and a generation_config.json that isn't JSON is ignored. Only values that are used are checked.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from .config_fields import GENERAL_FIELDS, TOKEN_IDS, Field, read_field, read_fields
from .safetensors_header import brief, check_depth, load_json, read_bytes, read_json

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_END_TOKENS = Field("eos_token_id", TOKEN_IDS)
_AGAIN = "Check the path, or download the checkpoint again."

logger = logging.getLogger(__name__)


def read_config(directory: Path) -> dict[str, Any]:
    """Read a directory's config.json.

    Raises:
        MissingTensorError: If the file is missing.
        CorruptError: If it is not an object of JSON, holds NaN, nests deeper than any real one, or a field that is read
            of every model is of another kind.
        CheckpointError: If it can't be read.
    """
    return check_config(read_json(directory / CONFIG_NAME, _AGAIN, infinity=True))


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Check config.json's value and return it with tagged floats decoded. Raises CorruptError as `read_config`."""
    check_depth(dict(config), CONFIG_NAME, _AGAIN)
    decoded: dict[str, Any] = _decode(dict(config))
    read_fields(decoded, GENERAL_FIELDS)
    if (text := decoded.get("text_config")) is not None:
        read_fields(text, GENERAL_FIELDS, f"{CONFIG_NAME} text_config")
    return decoded


def end_tokens(directory: Path, config: Mapping[str, Any]) -> int | list[int] | None:
    """Return the end-token ids from generation_config.json, or else ``config``; None if neither has any.

    Raises:
        CorruptError: If generation_config.json's values are not token ids.
        CheckpointError: If it can't be read.
    """
    text = config.get("text_config") or {}
    for source in (_read_generation_config(directory), config, text):
        if (ids := read_field(source, _END_TOKENS, GENERATION_CONFIG_NAME)) is not None:
            return ids
    return None


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling that a checkpoint's authors recommend.

    Attributes:
        temperature: Temperature; 0 is greedy.
        top_p: Total probability of the tokens to sample from; 1 for all.
        top_k: Number of tokens to sample from; 0 for all.
        min_p: Share of the top probability below which tokens are dropped.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __str__(self) -> str:
        """Return one phrase, such as "temperature 0.6, top-p 0.95, top-k 20"."""
        if self.temperature == 0:
            return "greedy"
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        parts += [f"min-p {self.min_p:g}"] if self.min_p else []
        return ", ".join(parts)


def sampling_defaults(directory: Path) -> SamplingDefaults:
    """Return the sampling that generation_config.json recommends; greedy if it recommends none.

    A value that no sampler takes is left out with a warning, because nothing but the default depends on it.
    """
    found = _read_generation_config(directory)
    kept: dict[str, Any] = {}
    for name, (kind, least, most) in _SAMPLING.items():
        value = found.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            logger.warning("%s of %s is left out: %s", name, directory / GENERATION_CONFIG_NAME, brief(value))
            continue
        kept[name] = value
    if found.get("do_sample") is False or not kept:
        return SamplingDefaults()
    return SamplingDefaults(**{"temperature": 1.0, **kept})


_SAMPLING: dict[str, tuple[Any, float, float]] = {
    "temperature": ((int, float), 0.0, 100.0),
    "top_p": ((int, float), 0.001, 1.0),
    "top_k": (int, 0, 1 << 31),
    "min_p": ((int, float), 0.0, 1.0),
}


def _read_generation_config(directory: Path) -> dict[str, Any]:
    path = directory / GENERATION_CONFIG_NAME
    if not path.exists():
        return {}
    advice = "Download it again, or remove it."
    data = read_bytes(path, advice)
    try:
        value = load_json(data, path.name, advice)
    except CorruptError as error:
        logger.warning("%s is left out, as mlx-lm does: %s", path, error)
        return {}
    if not isinstance(value, dict):
        raise CorruptError(f"[{path.name}] must be a JSON object, got {brief(value)}. {advice}")
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        tag = value.get("__float__")
        if len(value) == 1 and isinstance(tag, str) and tag in _FLOATS:
            return _decode(_FLOATS[tag])
        return {key: _decode(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    if isinstance(value, float) and math.isnan(
        value
    ):  # infinities occur in real files, as bounds of state-space models
        raise CorruptError(f"[{CONFIG_NAME}] must hold numbers, got NaN. {_AGAIN}")
    return value

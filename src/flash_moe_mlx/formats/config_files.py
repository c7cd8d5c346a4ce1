"""Reads config.json and generation_config.json, decodes them as mlx-lm does, and checks values before use.

mlx-lm's rules apply: transformers' tagged floats are floats, generation_config.json's end tokens take precedence over
config.json's, and a generation_config.json that isn't JSON is ignored. Only values that are used are checked.
"""

import logging
import math
from collections.abc import Mapping
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

"""Validation of mlx-lm's model arguments from config.json, and attribution of failures to the file or to mlx-lm.

mlx-lm validates nothing. Its dataclasses state which fields a model reads and their types, which tells a damaged file
from a model that this version of mlx-lm doesn't support well enough.
"""

import dataclasses
import importlib.util
import inspect
import re
import sys
import types
import typing
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm import __version__ as _mlx_lm_version
from mlx_lm.utils import _get_classes

from ..errors import CheckpointError, CorruptError, MissingTensorError, UnsupportedModelError
from ..formats.checkpoint import Checkpoint
from ..formats.config_fields import MAX_DIMENSION
from ..formats.foreign import ForeignCode, say
from ..formats.safetensors_header import brief

MLX_LM_VERSION: str = _mlx_lm_version

_FILE_NAME = re.compile(r"[\w-][\w.-]{0,100}\.py", re.ASCII)
_FRACTIONS = {"partial_rotary_factor"}
"""Fields that mlx-lm's mimo_v2_flash annotates as integers and multiplies with; config_fields.py checks them."""

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def find_classes(checkpoint: Checkpoint, config: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """Return the classes of a model and of its arguments: mlx-lm's, or those of the checkpoint's own file.

    Args:
        checkpoint: The opened checkpoint.
        config: The contents of its config.json.
        trust_remote_code: Whether the file that ``model_file`` names may be run.

    Raises:
        UnsupportedModelError: If mlx-lm doesn't know the model type, or the file must not or can't be run.
        CorruptError: If ``model_file`` is not the name of a file.
        MissingTensorError: If the file does not exist.
    """
    if (name := config.get("model_file")) is not None:
        return _own_classes(checkpoint.directory, name, trust_remote_code)
    try:
        # mlx-lm exposes its table of model types under this name only; the minor version is pinned.
        return _get_classes(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # AttributeError: the module is not a model
        raise UnsupportedModelError(
            f"[config.json] model_type must be one that mlx-lm knows, got {brief(config.get('model_type'))}. "
            "Check for a newer mlx-lm."
        ) from error


def _own_classes(directory: Path, name: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise CorruptError(
            f"[config.json] model_file must name a Python file of the checkpoint, got {brief(name)}. Restore the file."
        )
    if not trust_remote_code:
        raise UnsupportedModelError(
            f"[{directory.name}] must need no code of its own, got the model file {name}. If you trust it, pass "
            "trust_remote_code=True (--trust-remote-code)."
        )
    path = directory / name
    if not path.is_file():
        raise MissingTensorError(f"[{directory.name}] must hold {name}, got no such file. Download it.")

    def failed(error: BaseException) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"[{directory.name}] {name} must define Model and ModelArgs for mlx-lm {MLX_LM_VERSION}, got {say(error)}. "
            "Ask its author."
        )

    module_name = f"_flash_moe_mlx_{zlib.crc32(bytes(path.resolve())):08x}"
    with ForeignCode(failed):
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[module_name] = module  # dataclasses look types up there
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return module.Model, module.ModelArgs


def check_arguments(checkpoint: Checkpoint, config: Mapping[str, Any], args_class: Any) -> None:
    """Refuse integers that would make mlx-lm build more than any checkpoint's tensors could fill.

    Args:
        checkpoint: The opened checkpoint.
        config: The contents of its config.json.
        args_class: The dataclass of the model's arguments in mlx-lm.

    Raises:
        MissingTensorError: If config.json asks for more layers than are stored.
        CorruptError: If another integer that the model reads isn't whole, or doesn't fit an array's dimension.
    """
    text = config.get("text_config")
    expected = _types(args_class)
    for name, value in config.items():
        if name in expected:
            _check_integer(checkpoint, name, value, expected[name])
    if isinstance(text, Mapping):
        for name, value in text.items():
            _check_integer(checkpoint, name, value, Any)


def _check_integer(checkpoint: Checkpoint, name: str, value: Any, expected: Any) -> None:
    whole = type(value) is int
    if whole and name in _LAYER_COUNTS:
        checkpoint.require_layers(name, value)
    fraction = type(value) is float and not value.is_integer() and _fits(1, expected) and not _fits("", expected)
    fraction = fraction and float not in (expected, *typing.get_args(expected)) and name not in _FRACTIONS
    if fraction or (whole and not -MAX_DIMENSION <= value <= MAX_DIMENSION):
        raise CorruptError(
            f"[config.json] {name} must be an integer that fits an array's dimension, got {brief(value)}. "
            "Restore the file."
        )


def refuse(config: Mapping[str, Any], args_class: Any, error: BaseException) -> CheckpointError:
    """Return the error for a model that mlx-lm couldn't build from a config."""
    model_type = config.get("model_type")
    if wrong := _wrong_type(config, args_class):
        return CorruptError(f"[config.json] must describe a {model_type} model, got {wrong}. Restore the file.")
    if isinstance(error, TypeError) and (absent := _absent(config, args_class)):
        return CorruptError(
            f"[config.json] must describe a {model_type} model, got no {', '.join(absent)}. Restore the file."
        )
    return UnsupportedModelError(
        f"[config.json] must describe a {model_type} model that mlx-lm {MLX_LM_VERSION} can make, got {say(error)}. "
        "Compare the file with the original; if it is the same, check for another version of mlx-lm."
    )


def refuse_weights(checkpoint: Checkpoint, error: BaseException) -> CheckpointError:
    """Return the error for tensors that mlx-lm's model couldn't rename or quantise."""
    if isinstance(error, KeyError):
        return MissingTensorError(
            f"[{checkpoint.directory.name}] must have all tensors that mlx-lm's {checkpoint.config.get('model_type')} "
            f"renames, got none named {brief(str(error.args[0]) if error.args else '')}. Download the checkpoint again."
        )
    return UnsupportedModelError(
        f"[{checkpoint.directory.name}] must have tensors as mlx-lm {MLX_LM_VERSION} knows them, got {say(error)}. "
        "Convert the checkpoint with mlx_lm.convert, or check for a newer mlx-lm."
    )


def _types(args_class: Any) -> dict[str, Any]:
    """Return the types of the fields that a model reads, where they can be resolved."""
    if not dataclasses.is_dataclass(args_class):
        return {}
    try:
        return typing.get_type_hints(args_class)
    except (NameError, TypeError):
        return {field.name: Any for field in dataclasses.fields(args_class)}


def _absent(config: Mapping[str, Any], args_class: Any) -> list[str]:
    """Return the fields without a default that the config lacks."""
    parameters = inspect.signature(args_class).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name not in config]


def _wrong_type(config: Mapping[str, Any], args_class: Any) -> str | None:
    """Describe the first field whose value isn't of the type that mlx-lm states, or return None."""
    for name, expected in _types(args_class).items():
        if config.get(name) is not None and not _fits(config[name], expected):
            return f"{name} = {brief(config[name])}"
    return None


def _fits(value: Any, expected: Any) -> bool:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if expected in (int, float):  # configs write either kind of number for both
        return type(value) in (int, float)
    if expected is type(None):
        return value is None
    kind = origin or expected
    if kind is Any or not isinstance(kind, type):
        return True
    if kind in (list, tuple):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return isinstance(value, list) and all(_fits(entry, inner[0]) for entry in value if inner)
    return isinstance(value, kind)

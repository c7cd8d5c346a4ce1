"""ModelSpec: the input of loading, that is a module without weights, the weights to load, and its memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CorruptError, MissingTensorError, UnsupportedModelError
from ..experts.budget import ModelMemory

DtypeOf = Callable[[str, mx.array], mx.Dtype]
"""Function from (parameter name, value as stored) to the dtype it is kept in."""


@dataclass(frozen=True)
class ModelSpec:
    """A model validated from headers and config.json only; no weights have been read.

    Attributes:
        model: The module, with lazy parameters; has ``attach(engine)``.
        weights: Dense weights by parameter name, lazy, in the dtypes they are kept in.
        footprint: Memory needed in addition to the expert slots.
        num_experts_per_tok: Number of experts per token, K.
        lossy: Descriptions of requested options that change results.
    """

    model: Any
    weights: dict[str, mx.array]
    footprint: ModelMemory
    num_experts_per_tok: int
    lossy: tuple[str, ...] = ()


def convert(weights: Mapping[str, mx.array], dtype_of: DtypeOf) -> dict[str, mx.array]:
    """Convert weights, lazily, to the dtypes they are kept in."""
    return {name: value.astype(dtype_of(name, value)) for name, value in weights.items()}


def dense_bytes(weights: Mapping[str, mx.array]) -> int:
    """Return the bytes of the dense weights as they are kept."""
    return sum(value.nbytes for value in weights.values())


def load_bytes(stored: Mapping[str, mx.array]) -> int:
    """Return the maximum that converting one tensor needs besides its result: the largest tensor as stored."""
    return max((value.nbytes for value in stored.values()), default=0)


def check_tensors(spec: ModelSpec, where: str) -> None:
    """Compare names, shapes and kinds of the dense weights with the model's parameters; both are lazy.

    Raises:
        MissingTensorError: If a parameter has no tensor.
        UnsupportedModelError: If a tensor belongs to no parameter.
        CorruptError: If one has another shape, or integers in place of floats.
    """
    parameters = dict(tree_flatten(spec.model.parameters()))
    expected = {name: value.shape for name, value in parameters.items()}
    present = {name: value.shape for name, value in spec.weights.items()}
    if missing := sorted(expected.keys() - present.keys()):
        raise MissingTensorError(
            f"[{where}] must have {missing[0]}, got {len(missing)} tensors absent. Download the checkpoint again."
        )
    if unknown := sorted(present.keys() - expected.keys()):
        raise UnsupportedModelError(
            f"[{where}] must have only tensors that the model knows, got {unknown[0]} and {len(unknown) - 1} more. "
            "The checkpoint is of another architecture than config.json says."
        )
    for name, shape in present.items():
        if shape != expected[name]:
            raise CorruptError(
                f"[{where}] {name} must have shape {expected[name]} by config.json, got {shape}. "
                "Download the checkpoint again."
            )
    for name, value in spec.weights.items():
        quantised = f"{name.rpartition('.')[0]}.scales" in parameters
        if _is_float(parameters[name]) and not _is_float(value) and not quantised:
            raise CorruptError(f"[{where}] {name} must have floats, got {value.dtype}. Download the checkpoint again.")


def _is_float(value: mx.array) -> bool:
    return bool(mx.issubdtype(value.dtype, mx.floating))

"""ModelSpec: the input of loading, that is a module without weights, the weights to load, and its memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

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

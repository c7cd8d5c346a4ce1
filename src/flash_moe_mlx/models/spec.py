"""What loading needs to know of a model: its module without weights, the weights it will be given, its costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..experts.budget import ModelMemory

DtypeOf = Callable[[str, mx.array], mx.Dtype]
"""(parameter name, value as stored) to the dtype that it is kept in."""


@dataclass(frozen=True)
class ModelSpec:
    """A model of some type, found good from headers and config.json alone; no weight was read.

    Attributes:
        model: The module, its parameters lazy; has ``attach(engine)``.
        weights: Dense weights by parameter name, lazy, in the dtypes that they are kept in.
        costs: Bytes beside the expert slots.
        num_experts_per_tok: K.
        lossy: What was asked for that changes results.
    """

    model: Any
    weights: dict[str, mx.array]
    costs: ModelMemory
    num_experts_per_tok: int
    lossy: tuple[str, ...] = ()


def convert(weights: Mapping[str, mx.array], dtype_of: DtypeOf) -> dict[str, mx.array]:
    """The same weights, lazily in the dtypes that they are to be kept in."""
    return {name: value.astype(dtype_of(name, value)) for name, value in weights.items()}


def dense_bytes(weights: Mapping[str, mx.array]) -> int:
    """Bytes of the dense weights as they are kept."""
    return sum(value.nbytes for value in weights.values())


def load_bytes(stored: Mapping[str, mx.array]) -> int:
    """Most that converting one tensor needs beside the result: the largest as stored."""
    return max((value.nbytes for value in stored.values()), default=0)

"""What loading needs to know of a model type: its module without weights, its tensors' names and dtypes, its costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

from ..budget import ModelCosts
from ..checkpoint import Checkpoint

MLX_DTYPES = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16, "U32": mx.uint32}


@dataclass(frozen=True)
class Family:
    """A model of some type, found good from headers and config.json alone; no weight was read.

    Attributes:
        model: The module, its parameters lazy; has ``attach(engine)``.
        names: Stored name to parameter name of every dense tensor that is loaded.
        transform: (parameter name, stored value) to the value in the model's layout.
        loaded_dtype: (parameter name, stored dtype) to the dtype that it is kept in.
        costs: Bytes beside the expert slots.
        num_experts_per_tok: K.
        lossy: What was asked for that changes results.
    """

    model: Any
    names: Mapping[str, str]
    transform: Callable[[str, mx.array], mx.array]
    loaded_dtype: Callable[[str, mx.Dtype], mx.Dtype]
    costs: ModelCosts
    num_experts_per_tok: int
    lossy: tuple[str, ...] = ()


def dense_costs(
    checkpoint: Checkpoint, names: Mapping[str, str], loaded_dtype: Callable[[str, mx.Dtype], mx.Dtype]
) -> tuple[int, int]:
    """Bytes of the dense tensors as they are kept, and the most that converting one needs beside them."""
    dense, load = 0, 0
    for name, own in names.items():
        info = checkpoint.dense[name]
        stored = MLX_DTYPES.get(info.dtype, mx.float32)
        kept = prod(info.shape) * loaded_dtype(own, stored).size
        dense += kept
        load = max(load, info.nbytes if loaded_dtype(own, stored) != stored else 0)
    return dense, load

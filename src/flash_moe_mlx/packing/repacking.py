"""One expert's part from the words of AWQ or GPTQ, read and computed while packing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..formats.expert_tensors import Recipe
from ..ops.repacking import affine_part, is_in_order, out_of_order
from .quantiser import Bytes, to_bytes, to_mlx, worker_stream


def repacked(recipe: Recipe, expert: int, read: Callable[[Path, Sequence[Bytes], int], None]) -> Bytes:
    """Return the bytes of a part.

    Args:
        recipe: The tensors that the part is computed from.
        expert: Number of the expert.
        read: Function that reads a file into buffers from an offset.

    Raises:
        UnsupportedModelError: If groups hold inputs from anywhere, whatever config.json says.
    """
    with mx.stream(worker_stream()):
        arrays = {}
        for name, info in recipe.of(expert).items():
            data: Bytes = np.empty(info.nbytes, np.uint8)
            read(info.path, [data], info.offset)
            arrays[name] = to_mlx("U32" if info.dtype == "I32" else info.dtype, data, info.shape)
        order = arrays.get("g_idx")
        if order is not None and not is_in_order(order, arrays["scales"].shape[0]):
            raise out_of_order(recipe.tensors["g_idx"][expert].name)
        made = affine_part(recipe.part, arrays, recipe.method)
        mx.eval(made)
        return to_bytes(made)

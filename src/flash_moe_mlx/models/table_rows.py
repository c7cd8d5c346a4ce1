"""Embeddings whose table stays in its file: the rows of a token's ids are read when they are looked up.

For lookup tables that are many times larger than the vocabulary, such as n-gram embeddings, of which a token needs one
row each. Nothing is cached here: the page cache holds the rows in use.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..formats.safetensors_header import TensorInfo
from ..ops.slot_memory import MLX_DTYPES
from .spec import DtypeOf

ReadRows = Callable[[TensorInfo, Sequence[int], memoryview], None]
"""Reads rows of a stored tensor into a buffer: (tensor, ascending rows, buffer)."""


class RowsFromFile(nn.Module):
    """Replacement of an nn.Embedding or nn.QuantizedEmbedding whose output has the bits of the resident module.

    Until ``read_rows`` is set, it returns zeros; dry runs use this.

    Attributes:
        read_rows: Reader of rows.
    """

    read_rows: ReadRows | None

    def __init__(self, module: nn.Module, parts: Mapping[str, TensorInfo], dtypes: Mapping[str, mx.Dtype]):
        """Describe the table.

        Args:
            module: The module that is replaced.
            parts: Stored tensor of each of its parameters, by the parameter's name.
            dtypes: Dtype that each parameter would be kept in.
        """
        super().__init__()
        self._parts, self._dtypes = dict(parts), dict(dtypes)
        self._how: dict[str, Any] | None = None
        self.num_rows = parts["weight"].shape[0]
        self.dims = parts["weight"].shape[1]
        if isinstance(module, nn.QuantizedEmbedding):
            self._how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            self.dims = module.dims
        self.read_rows = None

    @property
    def parts(self) -> Mapping[str, TensorInfo]:
        """Stored tensor of each of the table's parameters."""
        return self._parts

    @property
    def nbytes(self) -> int:
        """Size of the table as it is stored."""
        return sum(info.nbytes for info in self.parts.values())

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the embeddings of ids: (...) to (..., dims). Evaluates the ids; each distinct row is read once."""
        if self.read_rows is None:
            scales = "weight" if self._how is None else "scales"
            dtype = self._dtypes[scales]
            return mx.zeros((*ids.shape, self.dims), dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16)
        rows, places = np.unique(np.array(ids) % self.num_rows, return_inverse=True)
        index = mx.array(places.reshape(ids.shape).astype(np.uint32))
        own = {name: self._rows(name, rows.tolist())[index] for name in self._parts}
        if self._how is None:
            return own["weight"]
        return mx.dequantize(own["weight"], own["scales"], own.get("biases"), **self._how)

    def _rows(self, name: str, rows: Sequence[int]) -> mx.array:
        """Read rows of one part, in the dtype that it would be kept in."""
        assert self.read_rows is not None
        info = self._parts[name]
        buffer = np.empty((len(rows), info.nbytes // info.shape[0]), np.uint8)
        if rows:
            self.read_rows(info, rows, buffer.data)
        return mx.array(buffer).view(MLX_DTYPES[info.dtype]).astype(self._dtypes[name])


def leave_tables(
    model: nn.Module,
    weights: Mapping[str, mx.array],
    tensors: Mapping[int, TensorInfo],
    vocabulary: int,
    table_bytes: int,
    dtype_of: DtypeOf,
) -> dict[str, mx.array]:
    """Replace a model's large tables by `RowsFromFile`, and return the weights without theirs.

    Args:
        model: The model, whose modules are quantised as they will be.
        weights: Lazy weights by parameter name, as stored.
        tensors: Stored tensors, by the identity of their arrays in ``weights``. Computed tables stay in memory.
        vocabulary: Number of token ids. Tables with no more rows stay: they may be the output projection as well.
        table_bytes: Size up to which tables stay in memory.
        dtype_of: Function to the dtype that a weight would be kept in.
    """
    kept = dict(weights)
    for path, module in model.named_modules():
        if type(module) not in (nn.Embedding, nn.QuantizedEmbedding):
            continue
        parameters = dict(tree_flatten(module.parameters()))
        names = {name: f"{path}.{name}" for name in parameters}
        found = {name: tensors.get(id(weights.get(full))) for name, full in names.items()}
        parts = {name: info for name, info in found.items() if info is not None and _fits(info, parameters[name])}
        # One that doesn't fit is left to the checks of all weights, which say so.
        if len(parts) < len(names) or parts["weight"].shape[0] <= vocabulary:
            continue
        if sum(info.nbytes for info in parts.values()) <= table_bytes:
            continue
        dtypes = {name: dtype_of(full, weights[full]) for name, full in names.items()}
        _replace(model, path, RowsFromFile(module, parts, dtypes))
        for full in names.values():
            del kept[full]
    return kept


def _fits(info: TensorInfo, parameter: mx.array) -> bool:
    """Return whether a stored tensor has the shape and the kind of numbers of a parameter."""
    stored = MLX_DTYPES[info.dtype]
    return info.shape == parameter.shape and mx.issubdtype(stored, mx.floating) == mx.issubdtype(
        parameter.dtype, mx.floating
    )


def tables_of(model: nn.Module) -> list[RowsFromFile]:
    """Return a model's tables that stay in their files."""
    return [module for _, module in model.named_modules() if isinstance(module, RowsFromFile)]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent: Any = model
    *parents, name = path.split(".")
    for part in parents:
        parent = parent[int(part)] if isinstance(parent, list) else getattr(parent, part)
    if isinstance(parent, list):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)

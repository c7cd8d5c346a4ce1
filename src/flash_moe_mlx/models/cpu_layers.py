"""Operations of a CPU decode step, built from a model's modules: products, norms, the shared expert."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..formats.expert_layout import PROJECTIONS
from ..ops.cpu import decode_tasks as tasks
from ..ops.cpu import product_tasks as products
from ..ops.cpu.arrays import KINDS, address, floats, view
from ..ops.cpu.expert_program import RecordOperations, UnsupportedLayerError, feed_forward, places_of, stored_format
from ..ops.cpu.kernels import Format
from ..ops.cpu.program import Operation
from ..ops.cpu.vector_ir import BF16
from ..ops.cpu.vectors import Pool, Vector
from ..ops.slot_memory import MLX_DTYPES
from .layers import Embedding, Linear, SwiGLU

_SIXTEEN_BITS = (mx.bfloat16, mx.float16)
_STORED = {mx.uint32: np.uint32, mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32}

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}


def product(linear: nn.Module, x: Vector, y: Any) -> Operation:
    """Build ``y = linear(x)``."""
    if not isinstance(linear, Linear):
        raise UnsupportedLayerError(type(linear).__name__)
    weight, form = linear.weight, x.format(_stored_format(linear, x.size))
    own = places_of(form, [*linear.parts.values()])
    bias, kind = (floats(linear.bias), KINDS[mx.float32]) if "bias" in linear else (0, 0)
    row_bytes = form.row_bytes(x.size)
    arguments = (*own, bias, kind, *x.input(form), weight.shape[0], x.size, row_bytes, y)
    nbytes = weight.shape[0] * row_bytes
    return Operation(products.matrix(form), products.blocks(weight.shape[0]), *arguments, nbytes=nbytes)


def _stored_format(linear: Linear, size: int) -> Format:
    """Return the format of a matrix that is multiplied with ``size`` values, after checking its arrays."""
    quantization, rows = linear.quantization, linear.weight.shape[0]
    stored = list(linear.parts.values())[-1]
    name_of = _NAMES.get(stored.dtype, str(stored.dtype))
    expected: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {"weight": (stored.dtype, (rows, size))}
    if quantization is not None:
        sizes = quantization.bits, quantization.group_size
        specs = quantization.scheme.specs(rows, size, *sizes, name_of)
        expected = {name: (MLX_DTYPES[dtype], shape) for name, (dtype, shape) in specs.items()}
    for name, part in linear.parts.items():
        if (part.dtype, part.shape) != expected[name]:
            raise UnsupportedLayerError(f"{name} of shape {part.shape} and {part.dtype}")
    return stored_format(quantization, name_of)


def normed(norm: nn.RMSNorm, x: np.ndarray, added: Any, y: Vector) -> Operation:
    """Build ``x += added`` (skipped if ``added`` is 0), then ``y = norm(x)``."""
    return Operation(tasks.norm, 1, x, added, vector_of(norm.weight, x.size), x.size, float(norm.eps), y.data)


def vector_of(weight: mx.array, size: int) -> np.ndarray:
    """Return a weight of ``size`` numbers as contiguous float32, whatever its stored dtype."""
    if weight.size != size:
        raise UnsupportedLayerError(f"a weight of shape {weight.shape} in place of {size} values")
    return floats(weight)


def shared_expert(shared: SwiGLU, x: Vector, y: np.ndarray, pool: Pool) -> RecordOperations:
    """Build the shared expert, as a record that starts at address 0."""
    forms: dict[str, Format] = {}
    places: dict[str, tuple[Any, ...]] = {}
    held: list[np.ndarray] = []
    width = shared.gate_proj.weight.shape[0]
    for projection in PROJECTIONS:
        linear = getattr(shared, projection)
        if not isinstance(linear, Linear) or "bias" in linear:
            raise UnsupportedLayerError(projection)
        forms[projection] = _stored_format(linear, width if projection == "down_proj" else x.size)
        views = [view(part, np.uint8) for part in linear.parts.values()]
        held += views
        places[projection] = places_of(forms[projection], [*map(address, views)])
    operations = feed_forward("shared", forms, places, width, x, 1, y, pool)
    operations.held = held
    return operations


class TokenEmbedding:
    """Embeddings of single tokens, read without an evaluation by MLX: that costs as much as two small layers.

    Equal to `Embedding.embed` bit for bit. Codes of up to 8 bits times 16-bit scales are exact in float32, so that only
    the sum with the bias is rounded; other tables are left to MLX.
    """

    def __init__(self, module: Embedding):
        self._module = module
        quantization, weight = module.quantization, module.weight
        self._rows: dict[str, np.ndarray] = {}
        self._kinds = {name: KINDS[part.dtype] for name, part in module.parts.items() if part.dtype in KINDS}
        if quantization is None:
            readable = weight.dtype in KINDS
        else:
            readable = quantization.mode == "affine" and quantization.bits in (2, 4, 8)
            readable = readable and {"weight", "scales", "biases"} == {*module.parts}
            readable = readable and all(module[name].dtype in _SIXTEEN_BITS for name in ("scales", "biases"))
            self._shifts = np.arange(0, 32, quantization.bits, dtype=np.uint32)
            self._mask = np.uint32((1 << quantization.bits) - 1)
        if readable:
            for name, part in module.parts.items():
                self._rows[name] = view(part, _STORED[part.dtype]).reshape(part.shape)

    def __call__(self, token: int) -> np.ndarray:
        """Return the embedding of a token id. Shape (H,), float32."""
        if not self._rows:
            return floats(self._module.embed(mx.array([token]), mx.float32))[0]
        weight = self._part("weight", token)
        if self._module.quantization is None:
            return weight
        codes = ((weight[:, None] >> self._shifts) & self._mask).astype(np.float32)
        scales, biases = self._part("scales", token)[:, None], self._part("biases", token)[:, None]
        return (codes.reshape(len(scales), -1) * scales + biases).reshape(-1)

    def _part(self, name: str, token: int) -> np.ndarray:
        row = self._rows[name][token]
        if name in self._kinds and self._kinds[name] == BF16:
            return (row.astype(np.uint32) << 16).view(np.float32)
        return row if row.dtype == np.uint32 else row.astype(np.float32)

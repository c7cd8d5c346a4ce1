"""Matrices that read the same hidden state, joined row-wise so that one launch multiplies all of them.

The joined matrix replaces the separate ones: their modules keep views of it, so a prompt, which multiplies them one by
one, reads the same bytes, and no byte is stored twice.
"""

from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx

from ..formats.expert_layout import PROJECTIONS, RecordLayout
from ..formats.schemes import AFFINE
from ..ops.gpu.kernel_source import MIN_DEVICE_ELEMENTS
from ..ops.norm import Norm
from ..ops.norm_matvec import Matrix, norm_matvec
from ..ops.slot_memory import DTYPE_NAMES, ExpertRecords
from .layers import Linear, SwiGLU

_PARTS = tuple(AFFINE.parts)


def _has_matrix(linear: object) -> bool:
    if not isinstance(linear, Linear) or linear.quantization is None or "bias" in linear:
        return False
    quantization = linear.quantization
    return "gpu" in quantization.scheme.kernels and linear.scales.dtype == linear.biases.dtype


def _by_format(linears: Sequence[Linear]) -> list[list[Linear]]:
    return [list(group) for _, group in groupby(linears, key=lambda linear: (linear.quantization, linear.scales.dtype))]


def fit(linears: Sequence[Linear]) -> bool:
    """Return whether the kernels multiply these modules' matrices, joined if they share a format.

    They must be affine-quantised and have no bias, and must not be so small that Metal passes them in another way.
    """
    return all(map(_has_matrix, linears)) and all(
        sum(linear.scales.size for linear in group) >= MIN_DEVICE_ELEMENTS for group in _by_format(linears)
    )


def matrix_of(linear: Linear) -> Matrix:
    """Return the matrix of a module that ``fit`` accepts."""
    assert linear.quantization is not None
    return Matrix(linear.weight, linear.scales, linear.biases, linear.quantization.bits, linear.quantization.group_size)


def _changed(linears: Sequence[Linear], seen: Sequence[mx.array]) -> bool:
    """Return whether a module's scales have been replaced since ``seen``."""
    return any(linear["scales"] is not scales for linear, scales in zip(linears, seen, strict=True))


class JoinedLinears:
    """Modules of one format joined into one matrix, one after the other."""

    def __init__(self, linears: Sequence[Linear]):
        """Join the modules' matrices; nothing is evaluated yet.

        Args:
            linears: Modules of one format that ``fit`` accepts.
        """
        self._linears = tuple(linears)
        self._joined: Matrix | None = None
        self._seen: tuple[mx.array, ...] = ()

    @property
    def matrix(self) -> Matrix:
        """Return the joined matrix, rebuilding it if weights or dtype have been replaced since."""
        joined = self._joined
        if joined is None or _changed(self._linears, self._seen):
            joined = self._joined = self._join()
        return joined

    def _join(self) -> Matrix:
        if len(self._linears) == 1:
            self._seen = (self._linears[0].scales,)
            return matrix_of(self._linears[0])
        for part in _PARTS:
            whole = mx.concatenate([linear[part] for linear in self._linears])
            mx.eval(whole)
            start = 0
            for linear in self._linears:
                end = start + len(linear[part])
                view = whole[start:end]
                mx.eval(view)
                linear[part], start = view, end
            if part == "weight":
                weight = whole
            elif part == "scales":
                scales = whole
            else:
                biases = whole
        self._seen = tuple(linear.scales for linear in self._linears)
        return matrix_of(self._linears[0])._replace(weight=weight, scales=scales, biases=biases)


class Projections:
    """All projections of one hidden state, with one product per run of equal formats."""

    def __init__(self, linears: Sequence[Linear]):
        """Join the modules' matrices.

        Args:
            linears: Modules that ``fit`` accepts.
        """
        self.groups = [JoinedLinears(group) for group in _by_format(linears)]

    @property
    def weights(self) -> tuple[mx.array, ...]:
        """Return the joined matrices' scales, which change whenever the matrices do."""
        return tuple(group.matrix.scales for group in self.groups)

    def __call__(self, x: mx.array, norm: Norm, dtype: mx.Dtype | None = None) -> mx.array:
        """Return the results concatenated: x (T, H) to (T, P)."""
        results = [norm_matvec(x, norm, group.matrix, dtype) for group in self.groups]
        return results[0] if len(results) == 1 else mx.concatenate(results, axis=-1)


class SharedRecord:
    """A shared expert as one record that its modules keep views of."""

    def __init__(self, shared: SwiGLU):
        """Pack the expert's matrices.

        Args:
            shared: A shared expert whose three modules ``fit`` accepts individually.
        """
        self._linears: list[Linear] = [shared[projection] for projection in PROJECTIONS]
        self._seen: tuple[mx.array, ...] = ()
        self._bank: ExpertRecords | None = None

    @property
    def bank(self) -> ExpertRecords:
        """Return the record, packing it again if weights or dtype have been replaced since."""
        if self._bank is None or _changed(self._linears, self._seen):
            self._bank = self._pack(self._linears)
            self._seen = tuple(linear["scales"] for linear in self._linears)
        return self._bank

    def _pack(self, linears: list[Linear]) -> ExpertRecords:
        specs = {
            (projection, part): (DTYPE_NAMES[linear[part].dtype], linear[part].shape)
            for projection, linear in zip(PROJECTIONS, linears, strict=True)
            for part in _PARTS
        }
        quantizations = {
            projection: linear.quantization for projection, linear in zip(PROJECTIONS, linears, strict=True)
        }
        layout = RecordLayout.contiguous(specs, quantizations)
        pieces, filled = [], 0
        for stored in layout.parts:
            piece = dict(zip(PROJECTIONS, linears, strict=True))[stored.projection][stored.part]
            if stored.offset > filled:
                pieces.append(mx.zeros((stored.offset - filled,), mx.uint8))
            pieces.append(mx.contiguous(piece).reshape(-1).view(mx.uint8))
            filled = stored.offset + stored.nbytes
        if layout.record_bytes > filled:
            pieces.append(mx.zeros((layout.record_bytes - filled,), mx.uint8))
        # Built on the GPU, so that the bytes live where a kernel's output does.
        array = mx.concatenate(pieces).view(mx.uint32).reshape(1, -1)
        mx.eval(array)
        for projection, linear in zip(PROJECTIONS, linears, strict=True):
            for part in _PARTS:
                stored = layout.by_name[f"{projection}.{part}"]
                words = array.reshape(-1)[stored.offset // 4 : -(-(stored.offset + stored.nbytes) // 4)]
                view = words.view(linear[part].dtype)[: linear[part].size].reshape(stored.shape)
                mx.eval(view)
                linear[part] = view
        return ExpertRecords(layout, array)

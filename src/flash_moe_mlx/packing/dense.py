"""The dense tensors of a packed checkpoint: copied as they are, or converted as mlx_lm.convert would.

Files follow the source's shards, without the experts, so that each shard is needed once. What mlx-lm's ``sanitize``
only renames goes by rows, however large a tensor is; what it computes (norms plus one, a convolution's axes) is made
at the end, by mlx-lm itself.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.expert_layout import DTYPE_BYTES, Quantization
from ..formats.safetensors_header import TensorInfo
from .quantiser import Bytes, quantise
from .settings import Conversion
from .tasks import Read, Segment, SourceFiles, TaskResult, Write

CHUNK_BYTES = 32 << 20
"""Approximate number of bytes that one task reads."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of an output file; ``offset`` is relative to the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class DenseFile:
    """An output file of dense tensors: an ordinary safetensors file whose header is known in advance."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    @classmethod
    def plan(
        cls, name: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> "DenseFile":
        """Lay out tensors (name, dtype, shape) one after another."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for tensor, dtype, shape in tensors:
            end = offset + prod(shape) * DTYPE_BYTES[dtype]
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        placed = tuple(
            OutputTensor(tensor, dtype, shape, start + header[tensor]["data_offsets"][0])
            for tensor, dtype, shape in tensors
        )
        return cls(name, struct.pack("<Q", len(text)) + text, placed)


@dataclass(frozen=True)
class CopyTask:
    """A task that copies source bytes (path, offset, length), in order, to one contiguous range of an output file."""

    pieces: tuple[tuple[Path, int, int], ...]
    offset: int
    output: str

    @property
    def needs(self) -> frozenset[Path]:
        return frozenset(path for path, _, _ in self.pieces)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (Segment(self.offset, sum(nbytes for _, _, nbytes in self.pieces)),)

    @property
    def reads(self) -> Iterator[Read]:
        yield from self.pieces

    def run(self, source: SourceFiles, write: Write) -> TaskResult:
        data = np.empty(self.segments[0].nbytes, np.uint8)
        done = 0
        for path, offset, nbytes in self.pieces:
            source.read(path, [data[done : done + nbytes]], offset)
            done += nbytes
        write(data.data, self.offset)
        return TaskResult((zlib.crc32(data.data),), {})


@dataclass(frozen=True)
class RowsTask:
    """A task that quantises rows ``first`` to ``last`` (exclusive) of one tensor."""

    source: TensorInfo
    first: int
    last: int
    conversion: Conversion
    targets: tuple[OutputTensor, ...]  # the parts of the quantisation
    output: str

    @property
    def needs(self) -> frozenset[Path]:
        return frozenset({self.source.path})

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(
            Segment(target.offset + self.first * row, (self.last - self.first) * row)
            for target in self.targets
            for row in (target.nbytes // prod(target.shape[:-1]),)
        )

    @property
    def reads(self) -> Iterator[Read]:
        row = self.source.nbytes // prod(self.source.shape[:-1])
        yield self.source.path, self.source.offset + self.first * row, (self.last - self.first) * row

    def run(self, source: SourceFiles, write: Write) -> TaskResult:
        row = self.source.nbytes // prod(self.source.shape[:-1])
        data: Bytes = np.empty((self.last - self.first) * row, np.uint8)
        source.read(self.source.path, [data], self.source.offset + self.first * row)
        parts = {"weight": (self.source.dtype, data)}
        made, _ = quantise(self.last - self.first, parts, self.conversion, measure=False)
        checksums = []
        for segment, part in zip(self.segments, self.conversion.target.scheme.parts, strict=True):
            write(made[part].data, segment.offset)
            checksums.append(zlib.crc32(made[part].data))
        return TaskResult(tuple(checksums), {})


def copy_tasks(file: DenseFile, sources: Mapping[str, TensorInfo]) -> Iterator[CopyTask]:
    """Return tasks that copy tensors (``sources``, by output name) into a file; small tensors share a task."""
    pieces: list[tuple[Path, int, int]] = []
    start = size = 0
    for tensor in file.tensors:
        info = sources.get(tensor.name)
        if pieces and (info is None or size + info.nbytes > CHUNK_BYTES):
            yield CopyTask(tuple(pieces), start, file.name)
            pieces, size = [], 0
        if info is None:
            continue
        for begin in range(0, info.nbytes, CHUNK_BYTES):
            nbytes = min(CHUNK_BYTES, info.nbytes - begin)
            if not pieces:
                start = tensor.offset + begin
            pieces.append((info.path, info.offset + begin, nbytes))
            size += nbytes
            if size >= CHUNK_BYTES:
                yield CopyTask(tuple(pieces), start, file.name)
                pieces, size = [], 0
    if pieces:
        yield CopyTask(tuple(pieces), start, file.name)


def row_tasks(file: DenseFile, source: TensorInfo, module: str, target: Quantization, dtype: str) -> Iterator[RowsTask]:
    """Return tasks that quantise one tensor into ``module``'s parts."""
    by_name = {tensor.name: tensor for tensor in file.tensors}
    targets = tuple(by_name[f"{module}.{part}"] for part in target.scheme.parts)
    rows = prod(source.shape[:-1])
    step = max(1, CHUNK_BYTES // max(1, source.nbytes // rows))
    for first in range(0, rows, step):
        yield RowsTask(source, first, min(rows, first + step), Conversion(None, target, dtype), targets, file.name)

"""Tasks of a packing, which may run in any order. Each reads source files and writes to one output file.

A task is small (tens of megabytes), always produces the same bytes, and is repeated if it was not finished.
"""

import mmap
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import CorruptError, PackError
from ..formats.expert_layout import DTYPE_BYTES, RecordPart, View
from ..formats.expert_tensors import Part
from ..storage.file_io import ReadOnlyFile
from ..system import preadv, raise_file_limit
from .quantiser import Bytes, ErrorSums, quantise
from .repacking import repacked
from .settings import Conversion

_MAX_BUFFERS = 512  # buffers per vectored read; systems accept 1024

ERROR_INTERVAL = 8
"""The quantisation error is measured on one expert in this many."""


@dataclass(frozen=True)
class Segment:
    """A byte range of an output file written by a task. The file's other bytes are its header and zeros."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class TaskResult:
    """A task's entry for the journal: the CRC-32 of each segment, and errors by projection."""

    checksums: tuple[int, ...]
    errors: Mapping[str, ErrorSums]


class Task(Protocol):
    """One unit of work."""

    @property
    def output(self) -> str:
        """Name of the output file."""
        ...

    @property
    def needs(self) -> frozenset[Path]:
        """Source files."""
        ...

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Byte ranges that the task writes."""
        ...

    @property
    def reads(self) -> "Iterator[Read]":
        """Byte ranges of source files that the task reads."""
        ...

    def run(self, source: "SourceFiles", write: "Write") -> TaskResult:
        """Read, convert and write. Runs on a worker thread."""
        ...


Read = tuple[Path, int, int]
"""A source file, an offset, and a number of bytes."""

Write = Callable[[memoryview, int], None]
"""Function that writes bytes at an offset of the task's output file."""


class SourceFiles:
    """Source files, each opened once. Safe to use from several threads."""

    def __init__(self) -> None:
        raise_file_limit()
        self._files: dict[Path, ReadOnlyFile] = {}

    def read(self, path: Path, buffers: Sequence[Bytes], offset: int) -> None:
        """Read consecutive bytes of a file into one buffer after another.

        Raises:
            CorruptError: If the file ends early.
            PackError: If it can't be read.
        """
        for first in range(0, len(buffers), _MAX_BUFFERS):
            some = [buffer.data for buffer in buffers[first : first + _MAX_BUFFERS]]
            offset += self._read(path, some, offset)

    def _read(self, path: Path, buffers: list[memoryview], offset: int) -> int:
        total = sum(len(buffer) for buffer in buffers)
        done = 0
        while done < total:
            try:
                got = preadv(self._open(path).fd, buffers, offset + done)
            except OSError as error:
                raise PackError(
                    f"[pack] {path.name} must be readable, got {error}. Check the disk; then the command continues."
                ) from error
            if got == 0:
                raise CorruptError(
                    f"[pack] {path.name} must have {total} bytes at offset {offset}, got {done}: it is truncated. "
                    "Download it again."
                )
            done += got
            while buffers and got >= len(buffers[0]):
                got -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][got:]
        return total

    def _open(self, path: Path) -> ReadOnlyFile:
        if (
            path not in self._files
        ):  # two threads may both open it: the loser's descriptor is closed on garbage collection
            self._files.setdefault(path, ReadOnlyFile(path, direct=False))
        return self._files[path]

    def close(self, path: Path | None = None) -> None:
        """Close one file, or all."""
        for each in [path] if path else list(self._files):
            if file := self._files.pop(each, None):
                file.close()


@dataclass(frozen=True)
class Item:
    """The smallest unit of an expert that a task writes: one copied part, or one projection's quantised parts.

    Attributes:
        sources: Parts to read, by name: "weight", plus its quantisation's other parts when requantising.
        targets: Parts to write, in the packed record.
        conversion: Conversion of the weights; None to copy the bytes.
    """

    sources: Mapping[str, Part]
    targets: tuple[RecordPart, ...]
    conversion: Conversion | None

    def files(self, expert: int) -> frozenset[Path]:
        return frozenset().union(*(part.files(expert) for part in self.sources.values()))


@dataclass(frozen=True)
class ExpertTask:
    """A task for some experts of a layer whose records follow each other: whole records, or some items of them.

    Attributes:
        layer: Number of the layer.
        experts: Numbers of the experts.
        place: Position of the first one's record in the output file.
        items: Items to write.
        runs: (begin, end) of the contiguous ranges of a record that the items fill, ignoring alignment gaps.
        whole: Whether the items are complete, so that whole records are written at once, including padding.
        stride: Bytes from one record to the next.
        data_offset: Offset of the first record in the output file.
    """

    layer: int
    experts: tuple[int, ...]
    place: int
    items: tuple[Item, ...]
    runs: tuple[tuple[int, int], ...]
    whole: bool
    stride: int
    data_offset: int
    output: str

    @property
    def needs(self) -> frozenset[Path]:
        return frozenset().union(*(item.files(e) for item in self.items for e in self.experts))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Return one segment per run of each record, expert by expert."""
        return tuple(
            Segment(self.data_offset + place * self.stride + begin, end - begin)
            for place in range(self.place, self.place + len(self.experts))
            for begin, end in self.runs
        )

    @property
    def reads(self) -> Iterator[Read]:
        for part in (part for item in self.items for part in item.sources.values()):
            for expert in self.experts:
                if part.recipe:
                    yield from ((info.path, info.offset, info.nbytes) for info in part.recipe.of(expert).values())
                    continue
                path, offset = part.locate(expert)
                yield (path, offset, _nbytes(part)) if part.view is None else (
                    path, offset - part.view.first, part.view.nbytes
                )  # fmt: skip

    def run(self, source: SourceFiles, write: Write) -> TaskResult:
        records, errors = self.make(source)
        checksums = tuple(zlib.crc32(record[begin:end].data) for record in records for begin, end in self.runs)
        start = self.data_offset + self.place * self.stride
        if self.whole:
            write(records.reshape(-1).data, start)
        else:
            for number, record in enumerate(records):
                for begin, end in self.runs:
                    write(record[begin:end].data, start + number * self.stride + begin)
        return TaskResult(checksums, errors)

    def make(self, source: SourceFiles) -> tuple[Bytes, dict[str, ErrorSums]]:
        """Return zero-filled records, shape (experts, stride). This thread's next call reuses their memory."""
        records = _zeros((len(self.experts), self.stride))
        errors: dict[str, ErrorSums] = {}
        for item in self.items:
            if item.conversion is None:
                ((_, part),) = item.sources.items()
                self._read(source, part, records[:, item.targets[0].offset :][:, : item.targets[0].nbytes])
            else:
                self._convert(source, item, item.conversion, records, errors)
        return records, errors

    def _convert(
        self,
        source: SourceFiles,
        item: Item,
        conversion: Conversion,
        records: Bytes,
        errors: dict[str, ErrorSums],
    ) -> None:
        parts: dict[str, tuple[str, Bytes]] = {}
        for name, part in item.sources.items():
            data = np.empty((len(self.experts), _nbytes(part)), np.uint8)
            self._read(source, part, data)
            parts[name] = (part.dtype, data)
        rows = item.targets[0].shape[0]
        for number in range(len(self.experts)):
            measure = (self.place + number) % ERROR_INTERVAL == 0
            one = {name: (dtype, data[number]) for name, (dtype, data) in parts.items()}
            made, error = quantise(rows, one, conversion, measure=measure)
            for target in item.targets:
                records[number, target.offset : target.offset + target.nbytes] = made[target.part]
            if error is not None:
                errors.setdefault(item.targets[0].projection, ErrorSums()).add(error)

    def _read(self, source: SourceFiles, part: Part, targets: Bytes) -> None:
        """Read one part of every expert into the rows of ``targets``; contiguous file ranges in one call."""
        if part.recipe:
            for number, expert in enumerate(self.experts):
                targets[number] = repacked(part.recipe, expert, source.read)
            return
        if part.view is not None:
            self._gather(source, part, part.view, targets)
            return
        pending: list[Bytes] = []
        begin: tuple[Path, int] | None = None
        for number, expert in enumerate(self.experts):
            path, offset = part.locate(expert)
            if begin is not None and (path, offset) != (begin[0], begin[1] + len(pending) * targets.shape[1]):
                source.read(begin[0], pending, begin[1])
                pending, begin = [], None
            begin = begin or (path, offset)
            pending.append(targets[number])
        if begin is not None:
            source.read(begin[0], pending, begin[1])

    def _gather(self, source: SourceFiles, part: Part, view: View, targets: Bytes) -> None:
        """Read one part of every expert and rearrange its elements row by row if the file stores them differently."""
        size = DTYPE_BYTES[part.dtype]
        block: Bytes = np.empty(view.nbytes, np.uint8)
        for number, expert in enumerate(self.experts):
            path, offset = part.locate(expert)
            source.read(path, [block], offset - view.first)
            elements = np.lib.stride_tricks.as_strided(
                block[view.first : view.first + size].view(f"u{size}"),
                part.shape,
                [size * step for step in view.strides],
                writeable=False,
            )
            targets[number].view(f"u{size}").reshape(part.shape)[...] = elements


_scratch = threading.local()


def _zeros(shape: tuple[int, int]) -> Bytes:
    """Return page-aligned zeros, in memory that this thread's next call reuses, since fresh pages cost more."""
    nbytes = shape[0] * shape[1]
    if len(getattr(_scratch, "pages", b"")) < nbytes:
        _scratch.pages = mmap.mmap(-1, nbytes)
    result = np.frombuffer(_scratch.pages, np.uint8, nbytes).reshape(shape)
    result[:] = 0
    return result


def _nbytes(part: Part) -> int:
    return prod(part.shape) * DTYPE_BYTES[part.dtype]


def merge_runs(targets: Sequence[RecordPart], layout_parts: Sequence[RecordPart]) -> tuple[tuple[int, int], ...]:
    """Merge neighbouring parts into runs (begin, end), including the alignment gaps between them."""
    chosen = {target.name for target in targets}
    runs: list[tuple[int, int]] = []
    previous = False
    for part in layout_parts:
        if part.name in chosen:
            begin = runs.pop()[0] if previous else part.offset
            runs.append((begin, part.offset + part.nbytes))
        previous = part.name in chosen
    return tuple(runs)

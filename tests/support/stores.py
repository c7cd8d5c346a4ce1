"""Stores for tests: one in memory, one that delays and fails on demand, and a system call that does."""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors

from flash_moe_mlx.errors import StoreError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.storage.store import ExpertStore, ReadRequest, writable_bytes

POISON = 0xA5
"""Filler of `FaultyStore`'s buffers until their bytes arrive, which code that reads too early sees."""


class _ReadsOf:
    """`PendingReads` of a store that isn't an `ExpertStore`: the same methods over one future."""

    def __init__(self, future: Future[int], completed: list[bool]):
        self._future = future
        self._completed = completed

    def wait(self) -> int:
        drained = False
        try:
            self._future.exception()
            drained = True
        finally:
            while not drained:
                with suppress(KeyboardInterrupt):
                    self._future.exception()
                    drained = True
        return self._future.result()

    def done(self) -> bool:
        return self._future.done()

    @property
    def completed(self) -> tuple[bool, ...]:
        return tuple(self._completed)


class InMemoryStore:
    """All records of a checkpoint, read once with plain file reads: no threads in the way, no files open."""

    io = "memory"
    num_threads = 0
    buffer_bytes = 0

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self.read_seconds = 0.0
        self.requests: list[tuple[int, int]] = []
        """(layer, expert) of every read, in order."""
        self._lock = threading.Lock()
        self._closed = False
        self._records: dict[tuple[int, int], bytes] = {}
        for layer in checkpoint.moe_layers:
            for expert in range(checkpoint.num_experts(layer)):
                record = bytearray(checkpoint.layout(layer).record_bytes)
                for r in checkpoint.ranges(layer, expert):
                    with r.path.open("rb") as file:
                        file.seek(r.file_offset)
                        record[r.record_offset : r.record_offset + r.nbytes] = file.read(r.nbytes)
                self._records[layer, expert] = bytes(record)

    def submit(self, requests: Sequence[ReadRequest]) -> _ReadsOf:
        self._check_open()
        targets = [writable_bytes(r, self.checkpoint.layout(r.layer).record_bytes) for r in requests]
        ranges = [self.checkpoint.ranges(r.layer, r.expert) for r in requests]
        nbytes = 0
        for request, target, of_one in zip(requests, targets, ranges, strict=True):
            record = self._records[request.layer, request.expert]
            for r in of_one:
                run = slice(r.record_offset, r.record_offset + r.nbytes)
                target[run] = record[run]
                nbytes += r.nbytes
        with self._lock:
            self.requests += [(request.layer, request.expert) for request in requests]
            self.bytes_read += nbytes
        future: Future[int] = Future()
        future.set_result(nbytes)
        return _ReadsOf(future, [True] * len(requests))

    def read_into(self, requests: Sequence[ReadRequest]) -> int:
        return self.submit(requests).wait()

    def drain(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        self._closed = True

    def __enter__(self) -> "InMemoryStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("[InMemoryStore] must be open, got a closed one. Open a new store.")


class FaultyStore:
    """Another store, seen through delay and faults. What it doesn't define is the inner store's.

    Buffers are poisoned when a batch is submitted and filled ``delay`` seconds later, on another thread. A request for
    which ``fault`` returns an exception keeps its poison, and `wait` raises the exception once all others are read.

    Attributes:
        delay: Seconds before a batch's reads begin.
        fault: Called with (layer, expert) of each request; returns what to raise, or None.
    """

    def __init__(
        self,
        inner: Any,
        *,
        delay: float = 0.0,
        fault: Callable[[int, int], Exception | None] = lambda layer, expert: None,
    ):
        self.inner = inner
        self.checkpoint: Checkpoint = inner.checkpoint
        self.delay = delay
        self.fault = fault
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="faulty-store")
        self._batches: list[Future[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def view(self, layer: int, expert: int) -> Mapping[str, memoryview]:
        time.sleep(self.delay)
        if error := self.fault(layer, expert):
            raise error
        return self.inner.view(layer, expert)

    def submit(self, requests: Sequence[ReadRequest]) -> _ReadsOf:
        self.inner.submit([]).wait()  # for its errors: is it open?
        targets = [writable_bytes(r, self.checkpoint.layout(r.layer).record_bytes) for r in requests]
        for request in requests:
            self.checkpoint.ranges(request.layer, request.expert)
        for request, target in zip(requests, targets, strict=True):
            for r in self.checkpoint.ranges(request.layer, request.expert):
                target[r.record_offset : r.record_offset + r.nbytes] = bytes([POISON]) * r.nbytes
        completed = [False] * len(requests)
        batch = self._pool.submit(self._run, tuple(requests), completed)
        self._batches = [other for other in self._batches if not other.done()] + [batch]
        return _ReadsOf(batch, completed)

    def read_into(self, requests: Sequence[ReadRequest]) -> int:
        return self.submit(requests).wait()

    def drain(self) -> None:
        wait(self._batches)
        self.inner.drain()

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.inner.close()

    def __enter__(self) -> "FaultyStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, requests: Sequence[ReadRequest], completed: list[bool]) -> int:
        time.sleep(self.delay)
        errors = [self.fault(request.layer, request.expert) for request in requests]
        good = [index for index, error in enumerate(errors) if error is None]
        nbytes = self.inner.read_into([requests[index] for index in good])
        for index in good:
            completed[index] = True
        for error in errors:
            if error is not None:
                raise error
        return nbytes


class FaultyPreadv:
    """Stands in for `os.preadv`: `monkeypatch.setattr(os, "preadv", FaultyPreadv(...))`.

    Attributes:
        fault: Called with (number of the call from 0, file offset, bytes wanted) before each read. It may raise, sleep,
            or return the most bytes to read; None reads all.
        calls: How many calls there were.
        running: How many are under way.
    """

    def __init__(self, fault: Callable[[int, int, int], int | None]):
        self.fault = fault
        self.calls = 0
        self.running = 0
        self._preadv = os.preadv
        self._lock = threading.Lock()

    def __call__(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        with self._lock:
            number = self.calls
            self.calls += 1
            self.running += 1
        try:
            (buffer,) = buffers
            most = self.fault(number, offset, len(buffer))
            return self._preadv(fd, [buffer if most is None else memoryview(buffer)[:most]], offset)
        finally:
            with self._lock:
                self.running -= 1


def expected_parts(checkpoint: Checkpoint) -> dict[tuple[int, int], dict[str, bytes]]:
    """Every part of every expert as safetensors itself reads the files."""
    stored: dict[str, Any] = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        stored |= dict(safetensors.deserialize(path.read_bytes()))
    result: dict[tuple[int, int], dict[str, bytes]] = {}

    def put(layer: int, expert: int, part: str, data: bytes) -> None:
        result.setdefault((layer, expert), {})[part] = bytes(data)

    for name, tensor in stored.items():
        words, data = name.split("."), bytes(tensor["data"])
        if "layers" not in words or words[0] == "mtp":
            continue
        layer = int(words[words.index("layers") + 1])
        share = len(data) // max(1, tensor["shape"][0])
        if "switch_mlp" in words:
            for expert in range(tensor["shape"][0]):
                put(layer, expert, ".".join(words[-2:]), data[expert * share : (expert + 1) * share])
        elif words[-1] == "gate_up_proj":
            for expert in range(tensor["shape"][0]):
                both = data[expert * share : (expert + 1) * share]
                put(layer, expert, "gate_proj.weight", both[: share // 2])
                put(layer, expert, "up_proj.weight", both[share // 2 :])
        elif words[-2:] == ["experts", "down_proj"]:
            for expert in range(tensor["shape"][0]):
                put(layer, expert, "down_proj.weight", data[expert * share : (expert + 1) * share])
        elif "experts" in words:
            put(layer, int(words[-3]), ".".join(words[-2:]), data)
    return result


def request_for(checkpoint: Checkpoint, layer: int, expert: int, fill: int = 0) -> ReadRequest:
    """A request with a buffer of its own."""
    size = checkpoint.layout(layer).record_bytes
    return ReadRequest(layer, expert, memoryview(bytearray([fill]) * size))


def parts_of(checkpoint: Checkpoint, request: ReadRequest) -> dict[str, bytes]:
    """Return the contents of a request's buffer, by part."""
    parts = checkpoint.layout(request.layer).parts
    return {part.name: bytes(request.buffer[part.offset : part.offset + part.nbytes]) for part in parts}


def direct_io_possible(directory: Path) -> bool:
    path = directory / "config.json"
    try:
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
    except OSError:
        return False
    return True


def make_store(checkpoint: Checkpoint, io: str, **options: Any) -> ExpertStore:
    """An `ExpertStore`; the test is skipped where ``io`` is not possible."""
    if io == "direct" and not direct_io_possible(checkpoint.directory):
        pytest.skip("the temporary folder's file system refuses O_DIRECT")
    return ExpertStore(checkpoint, io=io, **options)

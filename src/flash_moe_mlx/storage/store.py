"""Reads expert records from a checkpoint's files, on its own I/O threads, directly into the caller's memory.

Non-goals: caching (`cache.py` owns the slots) and computation. No MLX: threads touch only memoryviews. There are
three I/O modes, which return the same bytes:

- "pread": positioned reads through the page cache.
- "mmap": copies from a memory map of the file, after explicit read-ahead.
- "direct": positioned reads that bypass the page cache (O_DIRECT, F_NOCACHE), through the store's aligned buffers.
"""

import mmap
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ..config import READ_MODES
from ..errors import RequestError, ShortReadError, StoreError
from ..formats.checkpoint import ByteRange, Checkpoint
from .file_io import DIRECT_ALIGNMENT, ReadOnlyFile, read_aligned, read_fully
from .io_threads import IOThreads, Latch
from .record_check import RecordCheck

MIN_JOB_BYTES = 256 * 1024
"""Smallest job: below this size, dispatch (about 20 us) costs more than the read."""

MAX_JOB_BYTES = 2 * 1024 * 1024
"""Largest job, so that idle threads can take over the rest of a big batch."""

MAX_PIECE_BYTES = 1024 * 1024
"""Maximum bytes per system call. Also bounds the buffers of direct reads and the delay of an interrupt."""

_DIRECT_BUFFER_BYTES = MAX_PIECE_BYTES + 2 * DIRECT_ALIGNMENT  # a piece, plus alignment at both ends


def direct_buffer_bytes(num_threads: int) -> int:
    """Return the total size of the buffers of a store with ``io="direct"``."""
    return num_threads * _DIRECT_BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A request to read one expert's record into a buffer.

    Attributes:
        layer: Number of the layer.
        expert: Number of the expert.
        buffer: Writable, contiguous buffer of at least ``layout.record_bytes`` bytes. Padding is left unchanged.
        arrived: Called on an I/O thread once the whole record is in the buffer. Must not raise.
    """

    layer: int
    expert: int
    buffer: memoryview
    arrived: Callable[[], None] | None = None


class _Piece(NamedTuple):
    """A piece of one range of one request: ``target`` receives the file's bytes from ``offset``."""

    request: int
    file: ReadOnlyFile
    offset: int
    target: memoryview


class PendingReads:
    """A batch of reads in progress. The store owns its buffers until `wait` has returned or raised."""

    def __init__(
        self,
        requests: Sequence[ReadRequest],
        jobs: Sequence[Sequence[_Piece]],
        on_end: "Callable[[PendingReads], None]",
    ):
        self._requests = tuple(requests)
        self._jobs = tuple(jobs)
        self._open_pieces = [0] * len(self._requests)  # per request: number of pieces not read yet
        for job in jobs:
            for piece in job:
                self._open_pieces[piece.request] += 1
        self._errors: dict[int, StoreError] = {}  # the first error per request
        self._lock = threading.Lock()
        self._unclaimed = set(range(len(self._jobs)))  # jobs that no thread has started
        self._running = 0
        self._abandoned = False
        self._finished = Latch()
        self._fault: BaseException | None = None  # a bug in this library, raised on one of its threads
        self._bytes_read = 0
        self._on_end = on_end

    def wait(self) -> int:
        """Wait until every read of the batch has ended.

        No thread writes into a buffer after this has returned or raised any exception: on an interrupt, it drops the
        jobs that have not started, waits for those that have, and only then propagates the interrupt.

        Returns:
            The number of bytes read.

        Raises:
            StoreError: The error of the first failed request, in the batch's order. See `completed` for the others.
        """
        drained = False
        try:
            self._finished.wait()
            drained = True
        finally:
            if not drained:
                self._abandon()
        if self._errors:
            raise self._errors[min(self._errors)]
        if not all(self.completed):
            if self._fault is not None:
                raise self._fault
            raise StoreError(
                "[ExpertStore] a batch must be read to its end, got one given up by close() or an interrupt. "
                "Submit it again."
            )
        return self._bytes_read

    def done(self) -> bool:
        """Return whether every read of the batch has ended."""
        return self._finished.is_open()

    @property
    def completed(self) -> tuple[bool, ...]:
        """Return for each request whether its whole record is in its buffer."""
        with self._lock:
            return tuple(count == 0 and index not in self._errors for index, count in enumerate(self._open_pieces))

    # A job is either claimed by the thread that runs it or dropped by `_drop`, never both: whether an interrupt comes
    # before or after the pool takes a job, no read may start after its batch was abandoned.

    def _claim(self, job: int) -> bool:
        with self._lock:
            claimed = job in self._unclaimed
            self._unclaimed.discard(job)
            self._running += claimed
            return claimed

    def _release(self) -> None:
        with self._lock:
            self._running -= 1
            ended = not self._running and not self._unclaimed
        if ended:
            self._end()

    def _drop(self) -> None:
        """Drop the jobs that no thread has started."""
        with self._lock:
            self._abandoned = True
            self._unclaimed.clear()
            ended = not self._running
        if ended:
            self._end()

    def _end(self) -> None:
        """Mark the batch as ended. Safe to call again, as an interrupt may come in between."""
        self._on_end(self)
        self._finished.open()

    def _abandon(self) -> None:
        while not self._finished.is_open():
            with suppress(KeyboardInterrupt):  # a second interrupt: still no thread may write later
                self._drop()
                self._finished.wait()

    def _piece_read(self, piece: _Piece) -> bool:
        """Record a finished piece and return whether it was its record's last."""
        with self._lock:
            self._open_pieces[piece.request] -= 1
            self._bytes_read += len(piece.target)
            return self._open_pieces[piece.request] == 0

    def _piece_failed(self, piece: _Piece, error: StoreError) -> None:
        with self._lock:
            self._errors.setdefault(piece.request, error)


class _Running:
    """Context of a running job. Passes exceptions on to the batch's waiter."""

    def __init__(self, pending: PendingReads):
        self._pending = pending

    def __enter__(self) -> None:
        """Enter a job that has been claimed."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self._pending._fault = error
        self._pending._release()
        return True


class ExpertStore:
    """Reader of one checkpoint's expert records. A context manager; safe to use from several threads.

    Attributes:
        checkpoint: The checkpoint to read.
        io: "pread", "mmap" or "direct".
        num_threads: Number of I/O threads.
        check: Comparison of records with their checksums.
    """

    def __init__(self, checkpoint: Checkpoint, *, io: str = "pread", num_threads: int = 8, verify: str | bool = False):
        """Open every file that contains experts, once.

        Args:
            checkpoint: The checkpoint to read.
            io: "pread", "mmap" or "direct".
            num_threads: Number of I/O threads.
            verify: Which records of a packed checkpoint `submit` compares with their checksums: "full" all that it
                reads, "sample" one in 16, False none.

        Raises:
            RequestError: If ``io`` or ``num_threads`` is invalid.
            ShortReadError: If a file is shorter than its header says.
            StoreError: If a file can't be opened (with ``io="direct"``: without the page cache), or is not the file
                whose header was read.
        """
        if io not in READ_MODES:
            raise RequestError(f"[ExpertStore] io must be one of {', '.join(READ_MODES)}, got {io!r}. Use one of them.")
        if type(num_threads) is not int or num_threads < 1:
            raise RequestError(f"[ExpertStore] num_threads must be at least 1, got {num_threads!r}. Try 8.")
        self.io = io
        self.num_threads = num_threads
        self.checkpoint = checkpoint
        self.check = RecordCheck(checkpoint, verify)
        self._lock = threading.Lock()
        self._closed = False
        self._bytes_read = 0
        self._read_seconds = 0.0
        self._under_way: set[PendingReads] = set()
        self._busy_since = 0.0
        self._files: dict[Path, ReadOnlyFile] = {}
        self._buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        opened = False
        try:
            sizes: dict[Path, int] = {}
            for info in checkpoint.tensors.values():
                sizes[info.path] = max(sizes.get(info.path, 0), info.offset + info.nbytes)
            for path in checkpoint.expert_files:
                self._files[path] = ReadOnlyFile(path, direct=io == "direct")
                _check_size(self._files[path], sizes[path])
            opened = True
        finally:
            if not opened:
                self._close_files()
        if io == "direct":
            for _ in range(num_threads):
                self._buffers.put(mmap.mmap(-1, _DIRECT_BUFFER_BYTES))  # page-aligned
        self._threads = IOThreads(num_threads, "flash-moe-io")

    # --- reading ---

    def submit(self, requests: Sequence[ReadRequest]) -> PendingReads:
        """Start reading records into their buffers, concurrently.

        Raises:
            RequestError: If a layer, expert or buffer is invalid; then nothing is read.
            StoreError: If the store is closed.
        """
        targets = [writable_bytes(r, self.checkpoint.layout(r.layer).record_bytes) for r in requests]
        ranges = [self.checkpoint.ranges(r.layer, r.expert) for r in requests]
        pending = PendingReads(requests, self._split(targets, ranges), self._batch_ended)
        begun = False
        try:
            with self._lock:
                self._check_open()
                if not self._under_way:
                    self._busy_since = time.perf_counter()
                self._under_way.add(pending)
            for job in range(len(pending._jobs)):
                self._threads.submit(partial(self._run, pending, job))
            if not pending._jobs:
                pending._drop()
            begun = True
        finally:
            if not begun:  # also on an interrupt: nobody would wait for the jobs that have started
                pending._abandon()
        return pending

    def read_into(self, requests: Sequence[ReadRequest]) -> int:
        """Read records into their buffers and wait. Returns the bytes read. Raises as `submit` and `wait`."""
        return self.submit(requests).wait()

    def drain(self) -> None:
        """Wait until no batch is in progress, for use after an interrupt. Raises nothing."""
        with self._lock:
            under_way = tuple(self._under_way)
        for pending in under_way:
            pending._abandon()

    # --- counters and lifetime ---

    @property
    def bytes_read(self) -> int:
        """Total bytes read into buffers by finished batches."""
        return self._bytes_read

    @property
    def read_seconds(self) -> float:
        """Wall-clock seconds during which at least one batch was in progress, up to the last idle moment."""
        return self._read_seconds

    @property
    def buffer_bytes(self) -> int:
        """Total size of the store's own buffers."""
        return direct_buffer_bytes(self.num_threads) if self.io == "direct" and not self._closed else 0

    def close(self) -> None:
        """End the threads, and close and unmap the files. Reads not yet started fail. May be called again."""
        with self._lock:  # every step is repeatable, so that a close cut short by an interrupt can be finished
            self._closed = True
            under_way = tuple(self._under_way)
        for pending in under_way:
            pending._drop()
        self._threads.close()
        self._close_files()
        while not self._buffers.empty():
            self._buffers.get().close()

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- on the calling thread ---

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("[ExpertStore] must be open, got a closed one. Open a new store.")

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()

    def _split(self, targets: Sequence[memoryview], ranges: Sequence[Sequence[ByteRange]]) -> list[list[_Piece]]:
        """Split requests into jobs of about equal size: small reads share a job, large ones span several."""
        total = sum(r.nbytes for of_one in ranges for r in of_one)
        limit = min(max(-(-total // self.num_threads), MIN_JOB_BYTES), MAX_JOB_BYTES)
        jobs: list[list[_Piece]] = []
        room = 0
        for index, (target, of_one) in enumerate(zip(targets, ranges, strict=True)):
            for r in of_one:
                file, to_file = self._files[r.path], r.file_offset - r.record_offset
                begin, end = r.record_offset, r.record_offset + r.nbytes
                while begin < end:
                    if room == 0:
                        jobs.append([])
                        room = limit
                    size = min(room, end - begin, MAX_PIECE_BYTES)
                    jobs[-1].append(_Piece(index, file, begin + to_file, target[begin : begin + size]))
                    begin += size
                    room -= size
        return jobs

    # --- on the I/O threads ---

    def _run(self, pending: PendingReads, number: int) -> None:
        if not pending._claim(number):
            return
        with _Running(pending):
            self._read_job(pending, pending._jobs[number])

    def _read_job(self, pending: PendingReads, job: Sequence[_Piece]) -> None:
        if self.io == "mmap":
            for piece in job:
                with suppress(StoreError, OSError):  # only advice: copying reports any real problem with the file
                    piece.file.read_ahead(piece.offset, len(piece.target))
        for piece in job:
            if pending._abandoned:
                return
            request = pending._requests[piece.request]
            try:
                got = self._read(piece)
                if got < len(piece.target):
                    raise _short(request.layer, request.expert, piece.offset, len(piece.target), piece.file, got)
            except StoreError as error:
                pending._piece_failed(piece, error)
            except OSError as error:
                failure = StoreError(
                    f"[ExpertStore] layer {request.layer} expert {request.expert}: {len(piece.target)} bytes at "
                    f"offset {piece.offset} of {piece.file.path.name} must be readable, got {error}. "
                    "Check the disk and the system's log, then try again."
                )
                failure.__cause__ = error
                pending._piece_failed(piece, failure)
            else:
                if pending._piece_read(piece):
                    self._arrived(pending, piece)

    def _arrived(self, pending: PendingReads, piece: _Piece) -> None:
        """Check a complete record if it is due, and report its arrival."""
        request = pending._requests[piece.request]
        if self.check.is_due():
            record = memoryview(request.buffer).cast("B")
            if corrupt := self.check.find_error(request.layer, request.expert, record):
                pending._piece_failed(piece, corrupt)
                return
        if request.arrived is not None:
            request.arrived()

    def _read(self, piece: _Piece) -> int:
        """Read a piece. Returns the number of bytes read, fewer than requested only at end of file."""
        if self.io == "pread":
            return read_fully(piece.file.fd, piece.target, piece.offset)
        if self.io == "mmap":
            return piece.file.copy(piece.target, piece.offset)
        buffer = self._buffers.get()
        try:
            return read_aligned(piece.file.fd, buffer, piece.target, piece.offset)
        finally:
            self._buffers.put(buffer)

    def _batch_ended(self, pending: PendingReads) -> None:
        with self._lock:
            if pending not in self._under_way:
                return
            self._under_way.remove(pending)
            self._bytes_read += pending._bytes_read
            if not self._under_way:
                self._read_seconds += time.perf_counter() - self._busy_since


def writable_bytes(request: ReadRequest, nbytes: int) -> memoryview:
    """Return a request's buffer as plain bytes. Raises RequestError if it is read-only, strided or too small."""
    view = memoryview(request.buffer)
    if view.readonly or not view.c_contiguous or view.nbytes < nbytes:
        got = "a read-only one" if view.readonly else f"{view.nbytes} bytes"
        raise RequestError(
            f"[ExpertStore] a buffer must be writable, contiguous and have {nbytes} bytes, got {got}. "
            "Pass a memoryview of a slot."
        )
    return view.cast("B") if view.format != "B" or view.ndim != 1 else view


def _check_size(file: ReadOnlyFile, expected: int) -> None:
    if (size := file.size()) != expected:
        kind, what = (ShortReadError, "truncated") if size < expected else (StoreError, "another one now")
        raise kind(
            f"[ExpertStore] {file.path.name} must have {expected} bytes, as when its header was read, got {size}. "
            f"The file is {what}; open the checkpoint again, or download it again."
        )


def _short(layer: int, expert: int, offset: int, nbytes: int, file: ReadOnlyFile, got: int) -> ShortReadError:
    return ShortReadError(
        f"[ExpertStore] layer {layer} expert {expert}: expected {nbytes} bytes at offset {offset} of "
        f"{file.path.name}, got {got}. The file is truncated; download it again."
    )

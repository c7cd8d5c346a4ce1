"""Reads experts' records from a checkpoint's files, on its own I/O threads, straight into the caller's memory.

Non-goals: nothing is cached here (`cache.py` owns the slots) and nothing is computed. No MLX: threads touch
memoryviews only. Three ways to read, which return the same bytes:

- "pread": positioned reads through the page cache.
- "mmap": copies out of a map of the file, after explicit read-ahead.
- "direct": positioned reads past the page cache (O_DIRECT, F_NOCACHE), through aligned buffers of the store's own.
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
"""What a thread is given at once, at least: less costs less than handing it out (about 20 us)."""

MAX_JOB_BYTES = 2 * 1024 * 1024
"""What a thread is given at once, at most: of a batch that is larger, who is done first takes more."""

MAX_PIECE_BYTES = 1024 * 1024
"""Bytes of one system call, at most. It also bounds the buffers of direct reads, and what an interrupt waits for."""

_DIRECT_BUFFER_BYTES = MAX_PIECE_BYTES + 2 * DIRECT_ALIGNMENT  # a piece, and what alignment adds at both ends


def direct_buffer_bytes(num_threads: int) -> int:
    """Bytes of the buffers that a store with ``io="direct"`` has."""
    return num_threads * _DIRECT_BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """One expert's record, and where it is to go.

    Attributes:
        layer: Number of the layer.
        expert: Number of the expert.
        buffer: Writable, contiguous bytes; at least ``layout.record_bytes`` of them. Padding is left as it is.
        arrived: Called on an I/O thread once the whole record is in the buffer. Must not raise.
    """

    layer: int
    expert: int
    buffer: memoryview
    arrived: Callable[[], None] | None = None


class _Piece(NamedTuple):
    """A part of one range of one request: ``target`` is to hold the file's bytes from ``offset``."""

    request: int
    file: ReadOnlyFile
    offset: int
    target: memoryview


class PendingReads:
    """A batch of reads under way. Its buffers are the store's until `wait` has returned or raised."""

    def __init__(self, requests: Sequence[ReadRequest], jobs: Sequence[Sequence[_Piece]]):
        self._requests = tuple(requests)
        self._jobs = tuple(jobs)
        self._open_pieces = [0] * len(self._requests)  # of each request: those not read yet
        for job in jobs:
            for piece in job:
                self._open_pieces[piece.request] += 1
        self._errors: dict[int, StoreError] = {}  # the first of each request
        self._lock = threading.Lock()
        self._unclaimed = set(range(len(self._jobs)))  # jobs that no thread has begun
        self._running = 0
        self._abandoned = False
        self._finished = Latch()
        self._fault: BaseException | None = None  # of this library, from one of its threads
        self._bytes_read = 0
        self._on_end: Callable[[PendingReads], None] = lambda _: None

    def wait(self) -> int:
        """Wait until every read of the batch has ended.

        No thread writes into a buffer once this has returned or raised, whatever it raised: an interrupt drops what
        has not begun, waits for what has, and only then goes on its way.

        Returns:
            Bytes read.

        Raises:
            StoreError: Of the first request that failed, in the batch's order. `completed` tells the others.
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
        """Whether every read of the batch has ended."""
        return self._finished.is_open()

    @property
    def completed(self) -> tuple[bool, ...]:
        """For each request, whether its whole record is in its buffer."""
        with self._lock:
            return tuple(count == 0 and index not in self._errors for index, count in enumerate(self._open_pieces))

    # A job is claimed by the thread that runs it or dropped by `_drop`, never both: that no read begins after a batch
    # was given up must not hang on whether an interrupt came before or after the pool had taken the job.

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
        """Give up what no thread has begun."""
        with self._lock:
            self._abandoned = True
            self._unclaimed.clear()
            ended = not self._running
        if ended:
            self._end()

    def _end(self) -> None:
        """Safe to call again: an interrupt may have come in between."""
        self._on_end(self)
        self._finished.open()

    def _abandon(self) -> None:
        while not self._finished.is_open():
            with suppress(KeyboardInterrupt):  # a second one: still nobody may write later
                self._drop()
                self._finished.wait()

    def _piece_read(self, piece: _Piece) -> bool:
        """Note a piece; whether it was its record's last."""
        with self._lock:
            self._open_pieces[piece.request] -= 1
            self._bytes_read += len(piece.target)
            return self._open_pieces[piece.request] == 0

    def _piece_failed(self, piece: _Piece, error: StoreError) -> None:
        with self._lock:
            self._errors.setdefault(piece.request, error)


class _Running:
    """A job while a thread runs it. What it raises is for whoever waits for the batch."""

    def __init__(self, pending: PendingReads):
        self._pending = pending

    def __enter__(self) -> None:
        """The job has been claimed."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self._pending._fault = error
        self._pending._release()
        return True


class ExpertStore:
    """Experts' records of one checkpoint. A context manager; safe to use from several threads.

    Attributes:
        checkpoint: What is read.
        io: "pread", "mmap" or "direct".
        num_threads: I/O threads.
        check: Compares records with their checksums.
    """

    def __init__(self, checkpoint: Checkpoint, *, io: str = "pread", num_threads: int = 8, verify: str | bool = False):
        """Open every file that holds experts, once.

        Args:
            checkpoint: What is read.
            io: "pread", "mmap" or "direct".
            num_threads: I/O threads.
            verify: Which records of a packed checkpoint `submit` compares with their checksums: "full" all that it
                reads, "sample" one in 16, False none.

        Raises:
            RequestError: If ``io`` or ``num_threads`` can't be used.
            ShortReadError: If a file is shorter than its header said.
            StoreError: If a file can't be opened (for ``io="direct"`` also: not past the page cache), or is another
                than the one whose header was read.
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
        """Begin to read records into their buffers, all at once.

        Raises:
            RequestError: If a layer, expert or buffer can't be used; then nothing is read.
            StoreError: If the store is closed.
        """
        targets = [writable_bytes(r, self.checkpoint.layout(r.layer).record_bytes) for r in requests]
        ranges = [self.checkpoint.ranges(r.layer, r.expert) for r in requests]
        pending = PendingReads(requests, self._split(targets, ranges))
        with self._lock:
            self._check_open()
            if not self._under_way:
                self._busy_since = time.perf_counter()
            self._under_way.add(pending)
            pending._on_end = self._batch_ended
        begun = False
        try:
            for job in range(len(pending._jobs)):
                self._threads.submit(partial(self._run, pending, job))
            begun = True
        finally:
            if not begun:  # also for an interrupt: nobody would wait for what has begun
                pending._abandon()
        if not pending._jobs:
            pending._drop()
        return pending

    def read_into(self, requests: Sequence[ReadRequest]) -> int:
        """Read records into their buffers and wait for them. Returns bytes read; raises as `submit` and `wait`."""
        return self.submit(requests).wait()

    def drain(self) -> None:
        """Wait until no batch is under way: after an interrupt, when nobody holds one any more. Raises nothing."""
        with self._lock:
            under_way = tuple(self._under_way)
        for pending in under_way:
            pending._abandon()

    # --- what it has done and holds ---

    @property
    def bytes_read(self) -> int:
        """Bytes delivered into buffers by batches that have ended."""
        return self._bytes_read

    @property
    def read_seconds(self) -> float:
        """Wall-clock seconds in which at least one batch was under way, up to the last moment there was none."""
        return self._read_seconds

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the store's own buffers."""
        return direct_buffer_bytes(self.num_threads) if self.io == "direct" and not self._closed else 0

    def close(self) -> None:
        """End the threads, close and unmap the files. Reads not yet begun fail; may be called again."""
        with self._lock:  # every step may be taken again, so that what an interrupt cut short can be finished
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
        """Jobs of about equal size: small reads share one, large ones are spread over several."""
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
                with suppress(StoreError, OSError):  # only advice; what is wrong with the file, copying will say
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
        """Check a record that is whole, if it is one to check, and hand it on."""
        request = pending._requests[piece.request]
        if self.check.is_due():
            record = memoryview(request.buffer).cast("B")
            if corrupt := self.check.find_error(request.layer, request.expert, record):
                pending._piece_failed(piece, corrupt)
                return
        if request.arrived is not None:
            request.arrived()

    def _read(self, piece: _Piece) -> int:
        """Bytes of the piece that the file has; fewer than asked only at its end."""
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
    """A request's buffer as plain bytes; RequestError if it is read-only, strided or has fewer than ``nbytes``."""
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

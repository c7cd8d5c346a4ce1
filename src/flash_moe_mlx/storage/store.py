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
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from ..config import READ_MODES
from ..errors import RequestError, ShortReadError, StoreError
from ..formats.checkpoint import ByteRange, Checkpoint
from ..formats.safetensors_header import TensorInfo
from .file_io import DIRECT_ALIGNMENT, ReadOnlyFile, read_aligned, read_fully
from .io_threads import IOThreads
from .pending_reads import PendingReads, Piece, ReadRequest, RowsRequest, RunningJob
from .read_progress import READ_TIMEOUT_SECONDS, ReadProgress
from .record_check import RecordCheck

MIN_JOB_BYTES = 256 * 1024
"""Smallest job: below this size, dispatch (about 20 us) costs more than the read."""

MAX_JOB_BYTES = 2 * 1024 * 1024
"""Largest job, so that idle threads can take over the rest of a big batch."""

MIN_JOB_ROWS = 16
"""Fewest rows of a table per job, each of which is a read of its own."""

MAX_PIECE_BYTES = 1024 * 1024
"""Maximum bytes per system call. Also bounds the buffers of direct reads and the delay of an interrupt."""

_DIRECT_BUFFER_BYTES = MAX_PIECE_BYTES + 2 * DIRECT_ALIGNMENT  # a piece, plus alignment at both ends


def direct_buffer_bytes(num_threads: int) -> int:
    """Return the total size of the buffers of a store with ``io="direct"``."""
    return num_threads * _DIRECT_BUFFER_BYTES


class ExpertStore:
    """Reader of one checkpoint's expert records. A context manager; safe to use from several threads.

    Attributes:
        checkpoint: The checkpoint to read.
        io: "pread", "mmap" or "direct".
        num_threads: Number of I/O threads.
        check: Comparison of records with their checksums.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        io: str = "pread",
        num_threads: int = 8,
        verify: str | bool = False,
        read_timeout: float = READ_TIMEOUT_SECONDS,
    ):
        """Open every file that contains experts, once.

        Args:
            checkpoint: The checkpoint to read.
            io: "pread", "mmap" or "direct".
            num_threads: Number of I/O threads.
            verify: Which records of a packed checkpoint `submit` compares with their checksums: "full" all that it
                reads, "sample" one in 16, False none.
            read_timeout: Seconds without any progress after which reads fail.

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
        self._progress = ReadProgress(read_timeout)
        self._files: dict[Path, ReadOnlyFile] = {}
        self._buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        opened = False
        try:
            sizes: dict[Path, int] = {}
            for info in checkpoint.tensors.values():
                sizes[info.path] = max(sizes.get(info.path, 0), info.offset + info.nbytes)
            modified = {info.path: info.modified_ns for info in checkpoint.tensors.values()}
            for path in checkpoint.expert_files:
                self._files[path] = ReadOnlyFile(path, direct=io == "direct")
                _check_size(self._files[path], sizes[path])
                self._files[path].check_unchanged(modified[path])
            opened = True
        finally:
            if not opened:
                self._close_files()
        if io == "direct":
            for _ in range(num_threads):
                self._buffers.put(mmap.mmap(-1, _DIRECT_BUFFER_BYTES))  # page-aligned
        self._threads = IOThreads(num_threads, "flash-moe-io", self._progress)

    # --- reading ---

    def submit(self, requests: Sequence[ReadRequest]) -> PendingReads:
        """Start reading records into their buffers, concurrently.

        Raises:
            RequestError: If a layer, expert or buffer is invalid; then nothing is read.
            StoreError: If the store is closed, or an earlier read hangs.
        """
        targets = [writable_bytes(r, self.checkpoint.layout(r.layer).record_bytes) for r in requests]
        ranges = [self.checkpoint.ranges(r.layer, r.expert) for r in requests]
        return self._begin(requests, self._split(targets, ranges))

    def submit_rows(self, info: TensorInfo, rows: Sequence[int], buffer: memoryview) -> PendingReads:
        """Start reading rows of a dense tensor, one after the other into a buffer. Their file is opened once.

        Args:
            info: The tensor.
            rows: Indices of its first dimension, ascending.
            buffer: Writable, contiguous buffer of exactly the rows' bytes.

        Raises:
            StoreError: If the store is closed, the file can't be opened or has changed, or an earlier read hangs.
        """
        size, target = info.nbytes // info.shape[0], buffer.cast("B")
        file = self._file_of(info)
        pieces = [
            Piece(0, file, info.offset + row * size, target[place * size : (place + 1) * size])
            for place, row in enumerate(rows)
        ]
        share = max(-(-len(pieces) // self.num_threads), MIN_JOB_ROWS)
        jobs = [pieces[first : first + share] for first in range(0, len(pieces), share)]
        return self._begin([RowsRequest(f"rows of {info.name}", buffer)], jobs)

    def _begin(self, requests: Sequence[ReadRequest | RowsRequest], jobs: Sequence[Sequence[Piece]]) -> PendingReads:
        pending = PendingReads(requests, jobs, self._batch_ended, self._progress)
        begun = False
        try:
            with self._lock:
                self._check_open()
                self._check_answers()
                if not self._under_way:
                    self._busy_since = time.perf_counter()
                    self._progress.note()
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
        """Wait until no batch is in progress, for use after an interrupt.

        Raises:
            StoreError: If a read hangs, which may still write into its buffer.
        """
        with self._lock:
            under_way = tuple(self._under_way)
        for pending in under_way:
            pending._abandon()
        with self._lock:
            self._check_answers()

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
        """End the threads, and close and unmap the files. Reads not yet started fail. May be called again.

        If a read hangs, its thread and the files stay until it has ended.
        """
        with self._lock:  # every step is repeatable, so that a close cut short by an interrupt can be finished
            self._closed = True
            under_way = tuple(self._under_way)
        for pending in under_way:
            pending._drop()
        if self._threads.close():
            self._close_files()

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

    def _check_answers(self) -> None:
        for pending in self._under_way:
            if pending.hangs:
                raise pending.hanging_error()

    def _file_of(self, info: TensorInfo) -> ReadOnlyFile:
        with self._lock:
            self._check_open()
            if info.path not in self._files:
                self._files[info.path] = ReadOnlyFile(info.path, direct=self.io == "direct")
            file = self._files[info.path]
        file.check_unchanged(info.modified_ns)
        return file

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        with suppress(queue.Empty):
            while True:
                self._buffers.get_nowait().close()

    def _split(self, targets: Sequence[memoryview], ranges: Sequence[Sequence[ByteRange]]) -> list[list[Piece]]:
        """Split requests into jobs of about equal size: small reads share a job, large ones span several."""
        total = sum(r.nbytes for of_one in ranges for r in of_one)
        limit = min(max(-(-total // self.num_threads), MIN_JOB_BYTES), MAX_JOB_BYTES)
        jobs: list[list[Piece]] = []
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
                    jobs[-1].append(Piece(index, file, begin + to_file, target[begin : begin + size]))
                    begin += size
                    room -= size
        return jobs

    # --- on the I/O threads ---

    def _run(self, pending: PendingReads, number: int) -> None:
        if not pending._claim(number):
            return
        with RunningJob(pending):
            self._read_job(pending, pending._jobs[number])

    def _read_job(self, pending: PendingReads, job: Sequence[Piece]) -> None:
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
                    raise _short(request.name, piece.offset, len(piece.target), piece.file, got)
                piece.file.check_unchanged()
            except StoreError as error:
                pending._piece_failed(piece, error)
            except (OSError, MemoryError) as error:
                failure = StoreError(
                    f"[ExpertStore] {request.name}: {len(piece.target)} bytes at offset {piece.offset} of "
                    f"{piece.file.path.name} must be readable, got {error!r}. "
                    "Check the disk and the system's log, then try again."
                )
                failure.__cause__ = error
                pending._piece_failed(piece, failure)
            else:
                if pending._piece_read(piece):
                    self._arrived(pending, piece)

    def _arrived(self, pending: PendingReads, piece: Piece) -> None:
        """Check a complete record if it is due, and report its arrival."""
        request = pending._requests[piece.request]
        if isinstance(request, RowsRequest):
            return
        if self.check.is_due():
            record = memoryview(request.buffer).cast("B")
            if corrupt := self.check.find_error(request.layer, request.expert, record):
                pending._piece_failed(piece, corrupt)
                return
        if request.arrived is not None:
            request.arrived()

    def _read(self, piece: Piece) -> int:
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
            if self._under_way:
                return
            self._read_seconds += time.perf_counter() - self._busy_since
            self._progress.end()
        if self._closed:  # while this batch's last read hung
            self._close_files()


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


def _short(name: str, offset: int, nbytes: int, file: ReadOnlyFile, got: int) -> ShortReadError:
    return ShortReadError(
        f"[ExpertStore] {name}: expected {nbytes} bytes at offset {offset} of {file.path.name}, got {got}. "
        "The file is truncated; download it again."
    )

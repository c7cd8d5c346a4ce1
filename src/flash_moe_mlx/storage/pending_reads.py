"""A batch of reads in progress: its requests, their pieces, and the waiting for its end."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import StoreError
from .file_io import ReadOnlyFile
from .io_threads import Latch
from .read_progress import ReadProgress


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

    @property
    def name(self) -> str:
        """Name of the record, for errors."""
        return f"layer {self.layer} expert {self.expert}"


@dataclass(frozen=True, slots=True)
class RowsRequest:
    """A request to read rows of a stored tensor into a buffer.

    Attributes:
        name: Name of the rows, for errors.
        buffer: Writable, contiguous buffer of exactly the rows' bytes.
    """

    name: str
    buffer: memoryview


class Piece(NamedTuple):
    """A piece of one range of one request: ``target`` receives the file's bytes from ``offset``."""

    request: int
    file: ReadOnlyFile
    offset: int
    target: memoryview


class PendingReads:
    """A batch of reads in progress. The store owns its buffers until `wait` has returned or raised."""

    def __init__(
        self,
        requests: Sequence[ReadRequest | RowsRequest],
        jobs: Sequence[Sequence[Piece]],
        on_end: "Callable[[PendingReads], None]",
        progress: ReadProgress | None = None,
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
        self._progress = progress
        self.hangs = False  # a read did not end in time, and may still write into its buffer

    def wait(self) -> int:
        """Wait until every read of the batch has ended.

        No thread writes into a buffer after this has returned or raised, unless a read hangs: on an interrupt, it drops
        the jobs that have not started, waits for those that have, and only then propagates the interrupt. After a
        read has hung, the store refuses everything until it has ended.

        Returns:
            The number of bytes read.

        Raises:
            StoreError: The error of the first failed request, in the batch's order. See `completed` for the others.
                Or reads have not moved on for too long.
        """
        drained = False
        try:
            drained = self._finished.wait(self._progress)
        finally:
            if not drained:
                self._abandon()
        if not self._finished.is_open():
            raise self.hanging_error()
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
                if not self._finished.wait(self._progress):
                    self.hangs = True
                    return

    def hanging_error(self) -> StoreError:
        """Return the error for reads that don't move on."""
        first = self._requests[next((i for i, count in enumerate(self._open_pieces) if count), 0)]
        seconds = 0.0 if self._progress is None else self._progress.seconds
        return StoreError(
            f"[ExpertStore] {first.name}: the disk must deliver something within "
            f"{seconds:.0f} s, got nothing. Check its connection and the system's log; the model works again once "
            "the read has ended."
        )

    def _piece_read(self, piece: Piece) -> bool:
        """Record a finished piece and return whether it was its record's last."""
        if self._progress is not None:
            self._progress.note()
        with self._lock:
            self._open_pieces[piece.request] -= 1
            self._bytes_read += len(piece.target)
            return self._open_pieces[piece.request] == 0

    def _piece_failed(self, piece: Piece, error: StoreError) -> None:
        if self._progress is not None:
            self._progress.note()
        with self._lock:
            self._errors.setdefault(piece.request, error)


class RunningJob:
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

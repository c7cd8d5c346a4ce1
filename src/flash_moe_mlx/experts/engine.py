"""StreamingEngine: what ``model.streaming`` is. Owns store, slots, budget, counters and lock of one model."""

import gc
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import StreamingConfig, parse_size
from ..errors import MemoryLimitError, RequestError, StoreError
from ..forks import check_process, is_forked
from ..formats.expert_layout import RecordLayout
from ..ops.gpu.kernel_source import explain_refusals
from ..ops.slot_memory import ExpertBank
from ..stats import Counters, StreamingStats, format_bytes
from ..storage.store import ExpertStore
from .budget import Budget, LayerExperts, ModelCosts, buffer_cache_bytes, divide
from .buffer_cache import BufferCacheShare
from .cache import ExpertCache, Fetch
from .reservations import Reservations, Room, Snapshots
from .slots import PlannedWave, waves
from .trace import DECODE, PREFILL, TraceRecorder
from .wired_memory import WiredShare

logger = logging.getLogger(__name__)

_BEGUN = -1  # in place of a thread's identifier: any thread may wait for it


@dataclass(frozen=True)
class Wave:
    """Experts of one layer that are in memory together.

    Attributes:
        bank: The layer's slots.
        slots: Slot of each expert of the wave, by expert.
    """

    bank: ExpertBank
    slots: Mapping[int, int]


class TokenFetch:
    """Experts of one layer for one token: some in memory, the others being read.

    Attributes:
        misses: Experts that are being read.
    """

    def __init__(self, fetch: Fetch, bank: ExpertBank, counters: Counters):
        self.misses = fetch.misses
        self._fetch = fetch
        self._bank = bank
        self._counters = counters

    def addresses(self, experts: Sequence[int]) -> list[int]:
        """Where each expert's record begins in memory; those of misses are whole after ``wait``."""
        base, size = self._bank.address, self._bank.layout.record_bytes
        return [base + self._fetch.slots[expert] * size for expert in experts]

    def wait(self) -> None:
        """Wait until the misses are in memory.

        Raises:
            StoreError: If a record can't be read.
        """
        started = time.perf_counter()
        self._counters.bytes_read += self._fetch.wait()
        self._counters.read_seconds += time.perf_counter() - started


class StreamingEngine:
    """Streams the routed experts of one model under a hard memory limit.

    A context manager: leaving it closes the engine. One forward pass runs at a time; a second thread waits.
    """

    def __init__(
        self,
        store: ExpertStore,
        layouts: Mapping[int, RecordLayout],
        num_experts: Mapping[int, int],
        costs: ModelCosts,
        config: StreamingConfig,
        limit_bytes: int,
        num_experts_per_tok: int,
        lossy: Sequence[str] = (),
        io_reason: str = "",
    ):
        """Divide the limit and allocate the slots; call after the dense weights are in memory."""
        self._store = store
        self._costs = costs
        self._config = config
        self._layouts = dict(layouts)
        self._experts = {
            layer: LayerExperts(layout.record_bytes, num_experts[layer]) for layer, layout in layouts.items()
        }
        self._k = num_experts_per_tok
        self._lossy = tuple(lossy)
        self._io_reason = io_reason
        self._limit_bytes = limit_bytes
        self._reservations = Reservations(costs, 1, config.prefill_step_size, config.max_context)
        self._budget = self._divide(limit_bytes, self._reservations.reserved)
        self._counters = Counters()
        self._counted_from = self._counters.copy()
        self._unread: tuple[mx.array, int] | None = None
        self._recorder: TraceRecorder | None = None
        self._local = threading.local()
        self._closed = False
        self.slow_decode = ""  # why single tokens are not decoded the quick way; set by the model
        self.lock = threading.RLock()
        self._wired = WiredShare(limit_bytes, self._budget.dense_bytes)  # before slots, which are wired as they come
        self._cache = ExpertCache(store, layouts, self._budget.num_slots)
        self._applied = self._budget
        self._buffer_cache = BufferCacheShare(buffer_cache_bytes(self._budget.scratch_bytes))
        logger.info(
            "dense weights %s, %d of %d experts in slots (%s), read by %s",
            format_bytes(self._budget.dense_bytes),
            self._cache.total_slots,
            sum(num_experts.values()),
            format_bytes(self._budget.slot_bytes),
            store.io,
        )

    def _divide(self, limit_bytes: int, room: Room) -> Budget:
        return divide(
            limit_bytes,
            self._costs,
            self._experts,
            min_slots=self._k,
            batch=room.batch,
            tokens=room.tokens,
            length=room.length,
            io_buffer_bytes=self._store.buffer_bytes,
            held_bytes=room.more_bytes + sum(snapshots.max_bytes for snapshots in self._reservations.snapshots),
        )

    # What the model's forward pass calls, in this order, with the lock held.

    @contextmanager
    def forward_pass(
        self,
        batch: int,
        tokens: int,
        length: int,
        routed_tokens: int | None = None,
        caches: Sequence[Any] = (),
    ) -> Iterator[None]:
        """One forward pass of ``tokens`` new tokens per sequence, ending at ``length`` tokens of context.

        Holds the lock, and makes room: a pass or a context larger than the reserved one takes its
        memory from the expert slots.

        Args:
            batch: Sequences.
            tokens: New tokens per sequence.
            length: Tokens of context at the end.
            routed_tokens: Tokens of a padded batch that are no padding; None is all of them.
            caches: The conversation's caches. Their states are counted in the limit while they live.

        Raises:
            MemoryLimitError: If the limit can't hold it even with the fewest slots.
            RequestError: If ``length`` exceeds max_context.
            StoreError: If the engine is closed, or this process was forked from the one that loaded it.
        """
        check_process("model.streaming")
        with self.lock:
            self._check_open()
            if length > self._config.max_context:
                raise RequestError(
                    f"[model.streaming] the context must be at most max_context = {self._config.max_context} tokens, "
                    f"got {length}. Shorten the prompt or load with a larger max_context."
                )
            if self._applied is not self._budget:
                self._apply(self._budget)
            self._make_room(batch, tokens, length, caches)
            routed = batch * tokens if routed_tokens is None else routed_tokens
            if self._recorder is not None and self.is_recording:
                self._recorder.begin(routed, PREFILL if tokens > 1 else DECODE)
            finished = False
            try:
                with explain_refusals():
                    yield
                finished = True
            finally:
                if not finished:
                    self._store.drain()  # reads of what would have come next
                self._begin_unread()
            self._counters.tokens += routed

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("[model.streaming] must be open, got a closed one. Load the model again.")

    def _make_room(self, batch: int, tokens: int, length: int, caches: Sequence[Any]) -> None:
        reservations = self._reservations
        room = reservations.change(reservations.needed(batch, tokens, length, caches))
        if reservations.forget_dropped() or room is not None:
            try:
                budget = self._divide(self._limit_bytes, room or reservations.reserved)
            except MemoryLimitError:
                gc.collect()  # caches of conversations that have ended may be part of a cycle
                room = reservations.needed(batch, tokens, length, caches)
                budget = self._divide(self._limit_bytes, room)
            self._apply(budget, room)
        reservations.note(caches, batch, length)

    def _divide_anew(self, limit_bytes: int) -> tuple[Budget, Room]:
        """A budget for what is needed now, whatever was reserved for passes that have ended."""
        room = self._reservations.least()
        try:
            return self._divide(limit_bytes, room), room
        except MemoryLimitError:
            gc.collect()
            room = self._reservations.least()
            return self._divide(limit_bytes, room), room

    def _apply(self, budget: Budget, room: Room | None = None) -> None:
        self._settle()
        # Nothing uses scratch now: experts that stay are copied by way of it.
        spare = min(budget.scratch_bytes, self._applied.scratch_bytes)
        # Known before it is done: what an interrupt cuts short, the next pass finishes.
        self._budget = budget
        if room is not None:
            self._reservations.reserve(room)
        self._cache.resize(budget.num_slots, spare)
        self._applied = budget
        logger.info("%d experts in slots (%s)", self._cache.total_slots, format_bytes(budget.slot_bytes))

    def hidden_size(self, layer: int) -> int:
        """H of a layer's experts."""
        return self._layouts[layer].hidden_size

    def layout(self, layer: int) -> RecordLayout:
        """What a record of a layer looks like."""
        return self._layouts[layer]

    def waves(self, layer: int, experts: np.ndarray, counts: np.ndarray | None = None) -> Iterator[Wave]:
        """Bring experts of a layer into memory, in waves that the slots hold.

        Reads of the first wave are under way on return, and waited for when it is asked for; those of the next one
        go on while the caller computes. Those present come first, so that none that is wanted is evicted. The
        caller must have evaluated what it computed from one wave before it asks for the next.

        Args:
            experts: Distinct expert ids, ascending.
            counts: Tokens that picked each; None is one each.

        Raises:
            StoreError: If a record can't be read.
        """
        uses = None if counts is None else counts.tolist()
        tokens = 1 if uses is None else -(-sum(uses) // self._k)
        ordered, hits = self._cache.order(layer, experts.tolist(), uses, tokens)
        self._counters.hits += hits
        self._counters.misses += len(ordered) - hits
        planned = waves(ordered, hits, self._cache.num_slots(layer), tokens)
        return self._waves(layer, planned, self._acquire(layer, planned[0]) if planned else None)

    def token(self, layer: int, experts: list[int]) -> TokenFetch:
        """Begin to bring one token's distinct experts into memory: ``waves`` of one row, for CPU kernels.

        The caller computes with them before it calls this again.

        Raises:
            StoreError: If a record can't be read.
        """
        self._check_cancelled()
        self._settle()
        fetch = self._cache.acquire(layer, experts)
        self._counters.misses += len(fetch.misses)
        self._counters.hits += len(experts) - len(fetch.misses)
        return TokenFetch(fetch, self._cache.bank(layer), self._counters)

    def _check_cancelled(self) -> None:
        for cancelled in getattr(self._local, "cancelled", ()):
            if cancelled.is_set():
                raise CancelledError

    def _acquire(self, layer: int, wave: PlannedWave) -> Fetch:
        self._check_cancelled()
        self._settle()
        return self._cache.acquire(layer, wave.experts, counted=True, keep=wave.keep)

    def _waves(self, layer: int, planned: list[PlannedWave], first: Fetch | None) -> Iterator[Wave]:
        fetch = first
        for wave, following in itertools.zip_longest(planned, planned[1:]):
            current = self._acquire(layer, wave) if fetch is None else fetch
            started = time.perf_counter()
            self._counters.bytes_read += current.wait()
            if current.misses:
                self._counters.read_seconds += time.perf_counter() - started
            fetch = self._acquire(layer, following) if following is not None and following.keep else None
            yield Wave(self._cache.bank(layer), current.slots)

    def reading(self, output: mx.array) -> None:
        """Say that ``output``, not evaluated yet, reads slots: they are not overwritten before it is."""
        self._unread = (output, threading.get_ident())

    def _begin_unread(self) -> None:
        """Evaluate it on the thread whose stream it was built for; whoever overwrites slots waits for it."""
        if self._unread is not None:
            output, _ = self._unread
            mx.async_eval(output)
            self._unread = (output, _BEGUN)

    def _settle(self) -> None:
        if self._unread is not None:
            output, thread = self._unread
            # One that an interrupt kept from being begun can't be evaluated on any other thread: it is forgotten.
            if thread in (_BEGUN, threading.get_ident()):
                mx.eval(output)
            self._unread = None

    @property
    def is_recording(self) -> bool:
        """Whether routers' choices are being written to a trace."""
        return self._recorder is not None and not self._recorder.closed

    def record(self, layer: int, experts: np.ndarray, weights: mx.array | np.ndarray) -> None:
        """Note a router's choice, ids and weights of shape (T, K), if a trace is being recorded."""
        if self._recorder is not None and self.is_recording:
            floats = weights.astype(mx.float32) if isinstance(weights, mx.array) else weights
            self._recorder.record(layer, experts, np.array(floats))

    # What generation and snapshots call.

    @contextmanager
    def cancellable(self, cancelled: threading.Event) -> Iterator[None]:
        """Within it, a forward pass of this thread ends early once ``cancelled`` is set, before the next wave's reads.

        May be nested: any of the events ends the pass.

        Raises:
            concurrent.futures.CancelledError: Out of the forward pass.
        """
        before = getattr(self._local, "cancelled", ())
        self._local.cancelled = (*before, cancelled)
        try:
            yield
        finally:
            self._local.cancelled = before

    def add_snapshots(self, snapshots: Snapshots) -> None:
        """Set ``snapshots.max_bytes`` aside, from the expert slots.

        Raises:
            MemoryLimitError: If the limit can't spare them; nothing changes.
            StoreError: If the engine is closed.
        """
        check_process("PrefixCache")
        with self.lock:
            self._check_open()
            self._reservations.add_snapshots(snapshots)
            try:
                budget, room = self._divide_anew(self._limit_bytes)
            except MemoryLimitError:
                self._reservations.remove_snapshots(snapshots)
                raise
            self._apply(budget, room)

    def remove_snapshots(self, snapshots: Snapshots) -> None:
        """Give the memory back to the expert slots. Does nothing where it has been given back."""
        if is_forked():
            return
        with self.lock:
            if self._reservations.remove_snapshots(snapshots) and not self._closed:
                self._apply(*self._divide_anew(self._limit_bytes))

    # What users call.

    @property
    def max_context(self) -> int:
        """Tokens of context that the memory limit has room for."""
        return self._config.max_context

    @property
    def state_bytes(self) -> int:
        """Bytes that the caches and states of one sequence of max_context tokens take."""
        return self._costs.state_bytes(1, self._config.max_context)

    @property
    def peak_memory_bytes(self) -> int:
        """MLX's peak and the engine's own buffers."""
        return mx.get_peak_memory() + self._store.buffer_bytes

    @property
    def counters(self) -> Counters:
        """Running totals since load; never reset, so that differences always hold."""
        return self._counters

    def stats(self) -> StreamingStats:
        """Counters and memory at this moment."""
        counters, budget = self._counters.since(self._counted_from), self._budget
        return StreamingStats(
            tokens=counters.tokens,
            hits=counters.hits,
            misses=counters.misses,
            hit_rate=counters.hit_rate,
            bytes_read=counters.bytes_read,
            read_seconds=counters.read_seconds,
            memory_limit_bytes=budget.limit_bytes,
            peak_memory_bytes=self.peak_memory_bytes,
            dense_bytes=budget.dense_bytes,
            slot_bytes=budget.slot_bytes,
            num_slots=sum(budget.num_slots.values()),
            num_experts=sum(e.num_experts for e in self._experts.values()),
            io=self._store.io,
            io_reason=self._io_reason,
            lossy=self._lossy,
            slow_decode=self.slow_decode,
        )

    def reset_stats(self) -> None:
        """Set the counters and MLX's peak memory to zero. What is in memory stays."""
        check_process("model.streaming")
        with self.lock:
            self._counted_from = self._counters.copy()
            mx.reset_peak_memory()

    def trace(self, path: str | Path) -> TraceRecorder:
        """Record routing until the returned recorder is closed (it is a context manager) or the engine is.

        Example:
            >>> with model.streaming.trace("routing.npz"):
            ...     generate(model, tokenizer, "Hello")

        Raises:
            RequestError: If the directory does not exist.
            StoreError: If the engine is closed.
        """
        check_process("model.streaming")
        with self.lock:
            self._check_open()
            if self._recorder is not None:
                self._recorder.close()
            most = max(e.num_experts for e in self._experts.values())
            self._recorder = TraceRecorder(path, sorted(self._experts), most)
            return self._recorder

    def resize(self, memory_limit: int | str) -> None:
        """Change the memory limit of the running model. Waits for a forward pass under way.

        Raises:
            MemoryLimitError: If it can't hold; names the smallest limit that works, and nothing changes.
            RequestError: If it is not a size.
            StoreError: If the engine is closed.
        """
        check_process("model.streaming")
        limit_bytes = parse_size(memory_limit)
        with self.lock:
            self._check_open()
            budget, room = self._divide_anew(limit_bytes)
            self._apply(budget, room)
            self._limit_bytes = limit_bytes
            self._wired.resize(limit_bytes)

    def clear(self) -> None:
        """Forget every expert in memory, so that the next ones are read again."""
        check_process("model.streaming")
        with self.lock:
            self._settle()
            self._cache.clear()

    def close(self) -> None:
        """Release files, threads and slots. The model can't be used afterwards. Later calls do nothing.

        Does nothing in a process forked from the one that loaded the model: all is that one's.
        """
        if is_forked():
            return
        with self.lock:  # every step may be taken again, so that what an interrupt cut short can be finished
            self._closed = True
            if self._recorder is not None:
                self._recorder.close()
            self._settle()
            self._store.close()
            self._cache = ExpertCache(self._store, {}, {})
            mx.clear_cache()
            self._buffer_cache.close()
            self._wired.close()
            for snapshots in self._reservations.snapshots:
                snapshots.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> "StreamingEngine":
        """A copied model shares the engine: one lock and one set of slots, and closing it closes both."""
        return self

    def __enter__(self) -> "StreamingEngine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

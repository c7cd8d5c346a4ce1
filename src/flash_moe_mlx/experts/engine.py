"""StreamingEngine: the object behind ``model.streaming``. Owns a model's store, slots, budget, counters and lock."""

import gc
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import parse_size
from ..errors import MemoryLimitError, NonFiniteError, RequestError, StoreError
from ..forks import check_process, is_forked
from ..formats.checkpoint import Checkpoint
from ..formats.config_files import SamplingDefaults
from ..formats.safetensors_header import TensorInfo
from ..ops.gpu.kernel_source import explain_refusals
from ..ops.numerics import Activation
from ..ops.slot_memory import SlotMemory, UnifiedMemory
from ..stats import Counters, StreamingStats, format_bytes
from ..storage.store import ExpertStore
from ..system import trim_heap
from .budget import Budget, buffer_cache_bytes
from .buffer_cache import BufferCacheShare
from .cache import ExpertCache
from .debug_state import DebugState
from .distributed import DistributedExperts, Share
from .executor import ExpertExecutor
from .leading import Leader
from .local import LocalExperts
from .memory_plan import MemoryPlan
from .rank_methods import RankMethods
from .reader import ExpertReader
from .reservations import Reservations, Room, Snapshots
from .trace import DECODE, PREFILL, TraceRecorder
from .wired_memory import WiredShare

logger = logging.getLogger(__name__)


class StreamingEngine(RankMethods):
    """Streams the routed experts of one model under a hard memory limit.

    A context manager that closes the engine on exit. One forward pass runs at a time; other threads wait.
    """

    def __init__(
        self,
        store: ExpertStore,
        plan: MemoryPlan,
        memory: SlotMemory | None = None,
        lossy: Sequence[str] = (),
        share: Share | None = None,
    ):
        """Allocate the slots; call after the dense weights are in memory.

        Args:
            store: Store that reads experts as ``plan.reads`` says.
            plan: The memory plan.
            memory: Kind of memory that experts are read into; None is `UnifiedMemory`.
            lossy: Descriptions of the options that change results.
            share: This process's experts, if other processes compute the rest; ``plan`` counts only these.
        """
        demand = plan.demand
        self._store = store
        self._plan = plan
        self._share = share
        self._footprint = demand.footprint
        self._lossy = tuple(lossy)
        self._limit_bytes = plan.limit_bytes
        self._reservations = Reservations(demand.footprint, 1, demand.prefill_step_size, demand.max_context)
        self._budget = plan.budget
        self._closed = False
        self.sampling = SamplingDefaults()  # the checkpoint's own, from generation_config.json; set by load
        self.leader: Leader | None = None
        self.slow_decode = ""  # why single tokens are not decoded on the fast path; set by the model
        self.lock = threading.RLock()
        # Created before the slots, so that they are wired as they are allocated.
        self._wired = WiredShare(plan.limit_bytes, self._budget.dense_bytes)
        self._memory: SlotMemory = UnifiedMemory(store) if memory is None else memory
        self._cache = ExpertCache(self._memory, demand.layouts, self._budget.num_slots)
        if share is None:
            self._reader = ExpertReader(self._cache, demand.layouts, demand.num_experts)
        else:
            self._reader = ExpertReader(self._cache, demand.layouts, share.num_experts, share.experts())
            share.use(self._cache)
            counters = self._reader.counters
            share.ranks.progress = lambda: counters.bytes_read + counters.hits + counters.misses
        self._counted_from = self._reader.counters.copy()
        self._applied = self._budget
        self._buffer_cache = BufferCacheShare(
            buffer_cache_bytes(self._budget.scratch_bytes) + demand.footprint.kept_bytes
        )
        logger.info(
            "dense weights %s, %d of %d experts in slots (%s), read by %s",
            format_bytes(self._budget.dense_bytes),
            self._cache.total_slots,
            sum(demand.num_experts.values()),
            format_bytes(self._budget.slot_bytes),
            store.io,
        )

    def _divide(self, limit_bytes: int, room: Room) -> Budget:
        reserved_bytes = sum(snapshots.max_bytes for snapshots in self._reservations.snapshots)
        return self._plan.divide(limit_bytes, room, reserved_bytes)

    # Methods for the model's forward pass, in calling order, with the lock held.

    @contextmanager
    def forward_pass(
        self,
        batch: int,
        tokens: int,
        length: int,
        routed_tokens: int | None = None,
        caches: Sequence[Any] = (),
    ) -> Iterator[None]:
        """Run a forward pass of ``tokens`` new tokens per sequence, ending at ``length`` tokens of context.

        Holds the lock and makes room: a pass or a context larger than the reserved one takes memory from the expert
        slots.

        Args:
            batch: Number of sequences.
            tokens: New tokens per sequence.
            length: Tokens of context at the end of the pass.
            routed_tokens: Tokens of a padded batch that are not padding; None means all.
            caches: The conversation's caches. Their states count towards the limit while they live.

        Raises:
            MemoryLimitError: If the pass does not fit into the limit even with the fewest slots.
            RequestError: If ``length`` exceeds max_context.
            StoreError: If the engine is closed, or this process was forked from the one that loaded it.
        """
        check_process("model.streaming")
        if self.leader is not None:
            self.leader.check_announced()
        with self.lock:
            with nullcontext() if self._share is None else self._share.beginning(batch, tokens, length):
                self._begin_pass(batch, tokens, length, caches)
            routed = batch * tokens if routed_tokens is None else routed_tokens
            if self._reader.recorder is not None and self.is_recording:
                self._reader.recorder.begin(routed, PREFILL if tokens > 1 else DECODE)
            finished = False
            try:
                with explain_refusals():
                    yield
                finished = True
            finally:
                if not finished:
                    self._abandon_pass(sys.exception())
                self._reader.start_unread()
            self._reader.counters.tokens += routed

    def _begin_pass(self, batch: int, tokens: int, length: int, caches: Sequence[Any]) -> None:
        self._check_open()
        if length > self.max_context:
            raise RequestError(
                f"[model.streaming] the context must be at most max_context = {self.max_context} tokens, "
                f"got {length}. Shorten the prompt or load with a larger max_context."
            )
        self._store.drain()  # reads that an interrupt between two steps may have left
        if self._applied is not self._budget:
            self._apply(self._budget)
        self._make_room(batch, tokens, length, caches)

    def _abandon_pass(self, error: BaseException | None) -> None:
        # All ranks find the same non-finite numbers and cancel together; after any other error they are out of step.
        if self._share is not None and not isinstance(error, NonFiniteError | CancelledError):
            self._share.ranks.fail(f"ended a pass: {type(error).__name__} {error}")
        with suppress(StoreError):  # a read hangs: the next pass is refused until it has ended
            self._memory.drain()  # cancel reads for experts that would have come next

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("[model.streaming] must be open, got a closed one. Load the model again.")

    def _make_room(self, batch: int, tokens: int, length: int, caches: Sequence[Any]) -> None:
        reservations = self._reservations
        room = reservations.change(reservations.needed(batch, tokens, length, caches))
        if tokens > 1:
            trim_heap()
        if reservations.forget_dropped() or room is not None:
            try:
                budget = self._divide(self._limit_bytes, room or reservations.reserved)
            except MemoryLimitError:
                gc.collect()  # caches of finished conversations may be part of a reference cycle
                room = reservations.needed(batch, tokens, length, caches)
                budget = self._divide(self._limit_bytes, room)
            self._apply(budget, room)
        reservations.note(caches, batch, length)

    def _divide_anew(self, limit_bytes: int) -> tuple[Budget, Room]:
        """Return a budget for current needs only, ignoring reservations of finished passes."""
        room = self._reservations.least()
        try:
            return self._divide(limit_bytes, room), room
        except MemoryLimitError:
            gc.collect()
            room = self._reservations.least()
            return self._divide(limit_bytes, room), room

    def _divide_on_all(self, limit_bytes: int) -> tuple[Budget, Room]:
        """Divide anew; where ranks follow one that leads, all of them must have room."""
        led = None if self._share is None or not self._share.ranks.is_led else self._share.ranks
        try:
            divided = self._divide_anew(limit_bytes)
        except MemoryLimitError:
            if led is not None:
                led.gather(0)
            raise
        if led is not None and 0 in (found := led.gather(1)):
            raise MemoryLimitError(
                f"[memory_limit] every rank must have room, got a refusal of rank {found.index(0)}. Raise its limit."
            )
        return divided

    def _apply(self, budget: Budget, room: Room | None = None) -> None:
        self._reader.settle()
        self._reader.count_used()
        # Scratch memory is unused now, so experts that stay are copied through it.
        spare = min(budget.scratch_bytes, self._applied.scratch_bytes)
        # Recorded before resizing, so that the next pass can complete a resize that was interrupted.
        self._budget = budget
        if room is not None:
            self._reservations.reserve(room)
        self._cache.resize(budget.num_slots, spare)
        self._applied = budget
        logger.info("%d experts in slots (%s)", self._cache.total_slots, format_bytes(budget.slot_bytes))

    def executor(self, layer: int, activation: Activation | None = None) -> ExpertExecutor:
        """Return the executor of a layer's routed experts.

        Args:
            layer: The layer's number.
            activation: Activation between up and down projection, instead of SwiGLU.
        """
        local = LocalExperts(self._reader, layer, activation)
        return local if self._share is None else DistributedExperts(self._reader, layer, local, self._share)

    @property
    def is_recording(self) -> bool:
        """Whether the router's choices are being recorded in a trace."""
        return self._reader.is_recording

    # Methods for generation and snapshots.

    def agreed(self, tokens: mx.array) -> mx.array:
        """Return the tokens that rank 0 has sampled: others may have drawn others.

        Raises:
            DistributedError: If a rank fails or doesn't come in time.
        """
        if self._share is None or self._share.ranks.is_led:
            return tokens
        with self.lock:
            return self._share.agreed(tokens)

    def cancellable(self, cancelled: threading.Event) -> AbstractContextManager[None]:
        """End a forward pass of this thread early once ``cancelled`` is set, before the next group's reads.

        May be nested: any of the events ends the pass.

        Raises:
            concurrent.futures.CancelledError: From the forward pass.
        """
        return (self._reader if self._share is None else self._share).cancellable(cancelled)

    def add_snapshots(self, snapshots: Snapshots) -> None:
        """Reserve ``snapshots.max_bytes``, taken from the expert slots.

        Raises:
            MemoryLimitError: If the limit can't spare them; nothing changes.
            StoreError: If the engine is closed.
        """
        check_process("PrefixCache")
        with self.lock:
            self._check_open()
            self._reservations.add_snapshots(snapshots)
            try:
                budget, room = self._divide_on_all(self._limit_bytes)
            except MemoryLimitError:
                self._reservations.remove_snapshots(snapshots)
                raise
            self._apply(budget, room)

    def remove_snapshots(self, snapshots: Snapshots) -> None:
        """Return the memory to the expert slots. Does nothing if it has been returned already."""
        if is_forked():
            return
        with self.lock:
            if self._reservations.remove_snapshots(snapshots) and not self._closed:
                self._apply(*self._divide_anew(self._limit_bytes))

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Return whether sequences that will hold so many tokens each fit into the limit at once.

        Nothing is reserved: passes take what they need, as long as no others are begun.
        """
        with self.lock:
            try:
                for room in self._reservations.together(lengths):
                    self._divide(self._limit_bytes, room)
            except MemoryLimitError:
                return False
            return True

    def debug_state(self) -> DebugState:
        """Return the engine's parts as they are now, for tests and debugging."""
        return DebugState(
            budget=self._budget,
            demand=self._plan.demand,
            reserved_state_bytes=self._reservations.state_bytes,
            store=self._store,
            memory=self._memory,
            cache=self._cache,
            layers=self._cache.layers,
            reader=self._reader,
        )

    # Methods for users.

    @property
    def max_context(self) -> int:
        """Maximum number of context tokens that memory is reserved for."""
        return self._plan.demand.max_context

    @property
    def limit_bytes(self) -> int:
        """Limit on the memory that holds weights, states and slots."""
        return self._limit_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the caches and states of one sequence of max_context tokens."""
        return self._footprint.state_bytes(1, self.max_context)

    @property
    def peak_memory_bytes(self) -> int:
        """MLX's peak memory, plus the engine's own buffers if they are in the same memory."""
        return mx.get_peak_memory() + (self._store.buffer_bytes if self._plan.host is None else 0)

    @property
    def counters(self) -> Counters:
        """Running totals since load. Never reset, so that differences are always valid."""
        return self._reader.counters

    def __repr__(self) -> str:
        if self._closed:
            return "StreamingEngine(closed)"
        total = sum(self._plan.demand.num_experts.values())
        return (
            f"StreamingEngine({self._cache.total_slots:,} of {total:,} experts in "
            f"{format_bytes(self._budget.limit_bytes)}, read by {self._store.io})"
        )

    def _repr_html_(self) -> str:
        return repr(self) if self._closed else self.stats()._repr_html_()

    def stats(self) -> StreamingStats:
        """Return counters and memory use at this moment."""
        counters, budget, host = self._reader.counters.since(self._counted_from), self._budget, self._plan.host
        return StreamingStats(
            **counters.figures(),
            memory_limit_bytes=budget.limit_bytes if host is None else host.limit_bytes,
            peak_memory_bytes=self.peak_memory_bytes,
            dense_bytes=budget.dense_bytes,
            slot_bytes=budget.slot_bytes,
            num_slots=sum(budget.num_slots.values()),
            num_experts=sum(self._plan.demand.num_experts.values()),
            io=self._store.io,
            io_reason=self._plan.reads.reason,
            lossy=self._lossy,
            slow_decode=self.slow_decode,
            gpu_memory_limit_bytes=None if host is None else budget.limit_bytes,
            host_bytes=0 if host is None else self._memory.host_bytes + self._store.buffer_bytes,
        )

    def read_rows(self, info: TensorInfo, rows: Sequence[int], buffer: memoryview) -> None:
        """Read rows of a lookup table that stays in its file; takes the arguments of `ExpertStore.submit_rows`."""
        self.counters.row_bytes += self._store.submit_rows(info, rows, buffer).wait()
        self.counters.row_reads += len(rows)

    def reset_stats(self) -> None:
        """Set the counters and MLX's peak memory to zero. Cached experts stay in memory."""
        check_process("model.streaming")
        with self.lock:
            self._counted_from = self._reader.counters.copy()
            mx.reset_peak_memory()

    def trace(self, path: str | Path) -> TraceRecorder:
        """Record routing until the returned recorder (a context manager) or the engine is closed.

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
            if self._reader.recorder is not None:
                self._reader.recorder.close()
            num_experts = self._plan.demand.num_experts if self._share is None else self._share.num_experts
            self._reader.recorder = TraceRecorder(path, sorted(num_experts), max(num_experts.values()))
            return self._reader.recorder

    def resize(self, memory_limit: int | str | None = None, *, gpu_memory_limit: int | str | None = None) -> None:
        """Change the limit on the memory that holds the slots. Waits for the current forward pass to end.

        Args:
            memory_limit: The new limit, if there is a single memory.
            gpu_memory_limit: The new limit, if a GPU has its own memory; the host's can't be changed.

        Raises:
            MemoryLimitError: If the limit is too small; names the smallest limit that works, and nothing changes.
            RequestError: If the limit is not a size, or the other limit is the one to change.
            StoreError: If the engine is closed.
        """
        check_process("model.streaming")
        name = self._plan.demand.limit_name
        wanted, other = memory_limit, gpu_memory_limit
        if name == "gpu_memory_limit":
            wanted, other = other, wanted
        if wanted is None or other is not None:
            raise RequestError(
                f"[model.streaming] resize must be given only {name} here, where the slots are. Leave out the other."
            )
        limit_bytes = parse_size(wanted, name)
        with nullcontext() if self.leader is None else self.leader.announced("resize", limit_bytes=limit_bytes):
            self.resize_slots(limit_bytes)

    def resize_slots(self, limit_bytes: int) -> None:
        """Change the limit on the memory that holds the slots, as `resize` does, on this rank."""
        with self.lock:
            self._check_open()
            before, (budget, room) = self._budget, self._divide_on_all(limit_bytes)
            try:
                self._apply(budget, room)
            except MemoryLimitError:
                self._budget = replace(before)  # another object, so that the next pass applies it
                raise
            self._limit_bytes = limit_bytes
            self._wired.resize(limit_bytes)

    @contextmanager
    def between_passes(self) -> Iterator[tuple[ExpertReader, Checkpoint]]:
        """Hold the lock, and yield what reads experts into slots, and where they are."""
        check_process("model.streaming")
        with self.lock:
            self._check_open()
            yield self._reader, self._store.checkpoint

    def clear(self) -> None:
        """Drop all experts from memory, so that the next ones are read again."""
        check_process("model.streaming")
        with self.lock, nullcontext() if self.leader is None else self.leader.announced("empty"):
            self._reader.settle()
            self._cache.clear()

    def close(self) -> None:
        """Release files, threads and slots. The model can't be used afterwards. Later calls do nothing.

        Does nothing in a process forked from the one that loaded the model, which still owns everything.
        """
        if is_forked():
            return
        # Every step can be repeated, so that a close that was interrupted can be completed.
        with self.lock, ExitStack() as at_the_end:
            self._closed = True
            if self._reader.recorder is not None:
                at_the_end.callback(self._reader.recorder.close)  # raises if the disk is full
            self._reader.settle()
            self._store.close()
            self._cache = self._reader.cache = ExpertCache(self._memory, {}, {})
            with suppress(StoreError):  # a read hangs: what it may write into is never freed
                self._memory.close()
            self.free_buffers()
            self._buffer_cache.close()
            self._wired.close()
            for snapshots in self._reservations.snapshots:
                snapshots.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> "StreamingEngine":
        """Return itself: a copied model shares its engine, with one lock and one set of slots."""
        return self

    def __enter__(self) -> "StreamingEngine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

"""ExpertReader: brings a layer's experts into slots, in groups that fit, and tracks when slots may be overwritten."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..formats.expert_layout import RecordLayout
from ..ops.fetch_records import HostRecords
from ..ops.slot_memory import ExpertRecords, ExpertSlots
from ..stats import Counters
from .cache import ExpertCache, Fetch
from .cancellation import Cancellation
from .slots import PAIRWISE_TOKENS, PlannedGroup, plan_groups
from .trace import TraceRecorder

RESIDENT_SHARE = 8
"""A layer is read whole if at most this share of its experts is missing and the slots have room for all."""

TOKENS_REMEMBERED = 64
"""Number of recent tokens whose experts are reported to policies when slots change: a use counts half after 32."""

PROMOTION_TOKENS = 32
"""Number of tokens that run without the host before slots follow what they used."""

_STARTED = -1  # replaces a thread's identifier once any thread may wait for the array


@dataclass(frozen=True)
class ExpertGroup:
    """Experts of one layer that are in memory together.

    Attributes:
        bank: The layer's slots.
        slots: Slot of each expert of the group, by expert.
    """

    bank: ExpertRecords
    slots: Mapping[int, int]


class TokenFetch:
    """One layer's experts for one token, while missing ones are being read.

    Attributes:
        misses: Experts that are being read.
    """

    def __init__(self, fetch: Fetch, bank: ExpertRecords, counters: Counters):
        self.misses = fetch.misses
        self._fetch = fetch
        self._bank = bank
        self._counters = counters

    def slots_of(self, experts: Sequence[int]) -> list[int]:
        """Return each expert's slot; a missing expert's record is complete only after `wait`."""
        return [self._fetch.slots[expert] for expert in experts]

    def addresses(self, experts: Sequence[int]) -> list[int]:
        """Return the address of each expert's record; a missing expert's record is complete only after `wait`."""
        base, size = self._bank.address, self._bank.layout.record_bytes
        return [base + self._fetch.slots[expert] * size for expert in experts]

    def wait(self) -> None:
        """Wait until the missing experts are in memory.

        Raises:
            StoreError: If a record can't be read.
        """
        started = time.perf_counter()
        self._counters.bytes_read += self._fetch.wait()
        self._counters.read_seconds += time.perf_counter() - started


class ExpertReader:
    """Brings experts into slots for one engine. Called with the engine's lock held.

    Attributes:
        cache: Slots of all layers.
        counters: Running totals since load.
        recorder: Receives routers' choices while a trace is being recorded.
    """

    def __init__(
        self,
        cache: ExpertCache,
        layouts: Mapping[int, RecordLayout],
        num_experts: Mapping[int, int],
        own: Mapping[int, Sequence[int]] | None = None,
    ):
        """Wrap a cache.

        Args:
            cache: The cache.
            layouts: Record layout of each layer.
            num_experts: Number of experts of each layer.
            own: Experts of each layer that are read here; None means all.
        """
        self.cache = cache
        self.counters = Counters()
        self.recorder: TraceRecorder | None = None
        self._layouts, self._num_experts = dict(layouts), dict(num_experts)
        self._own = {layer: range(count) for layer, count in num_experts.items()} if own is None else dict(own)
        self._has_all = all(len(experts) == num_experts[layer] for layer, experts in self._own.items())
        self._used: deque[tuple[Sequence[int], mx.array]] = deque(maxlen=TOKENS_REMEMBERED)
        self._fetched = 0  # tokens that fetched experts since slots last followed what was used
        self._unread: tuple[mx.array, int] | None = None
        self._cancellation = Cancellation()

    def __deepcopy__(self, memo: dict[int, object]) -> "ExpertReader":
        """Return itself: a copied model shares its engine."""
        return self

    def layout(self, layer: int) -> RecordLayout:
        """Return the layout of a layer's records."""
        return self._layouts[layer]

    def groups(self, layer: int, experts: np.ndarray, counts: np.ndarray, tokens: int) -> Iterator[ExpertGroup]:
        """Bring experts of a layer into memory, in groups that fit into the slots.

        On return the first group is being read; it is waited for when it is requested, while the next group is read
        during the caller's computation. Cached experts come first, so that no wanted expert is evicted. The caller
        must evaluate what it computes from one group before it requests the next.

        Args:
            layer: The layer.
            experts: Distinct expert ids, ascending.
            counts: Number of tokens that picked each.
            tokens: Number of tokens in the forward pass.

        Raises:
            StoreError: If a record can't be read.
        """
        ordered, hits = self.cache.order(layer, experts.tolist(), counts.tolist(), tokens)
        self.counters.hits += hits
        self.counters.misses += len(ordered) - hits
        slots = self.cache.num_slots(layer)
        passing = self.cache.passing(layer) if tokens > PAIRWISE_TOKENS and len(ordered) > slots else None
        if passing is None:
            planned = plan_groups(ordered, hits, slots, tokens)
            return self._groups(layer, planned, self._acquire(layer, planned[0]) if planned else None)
        # The last ones are worth most: they take the slots that are free, and nothing is evicted.
        others = ordered[hits : len(ordered) - (slots - self.cache.num_present(layer))]
        planned = plan_groups(ordered[:hits] + ordered[hits + len(others) :], hits, slots, tokens)
        first = self._acquire(layer, planned[0]) if planned else None
        return itertools.chain(self._passing_groups(passing, others), self._groups(layer, planned, first))

    def table(self, layer: int) -> mx.array | None:
        """Return the slot of each expert of a layer, shape (E,), uint32, if all experts are in slots; else None.

        If the slots have room for all experts, and few are missing or their files are mapped for a GPU, the missing
        ones are read now.
        None while a trace is being recorded, because that needs the ids on the host.

        Raises:
            StoreError: If a record can't be read.
        """
        if self.is_recording:
            return None
        own = self._own[layer]
        missing = len(own) - self.cache.num_present(layer)
        if self.cache.num_slots(layer) < len(own):
            return None
        # Mapped files are read so fast that a token waits less for all experts than it gains by having them.
        if missing > len(own) // RESIDENT_SHARE and self.cache.host_records(layer) is None:
            return None
        self._check_cancelled()
        if missing:
            self.settle()
            fetch = self.cache.acquire(layer, list(own), counted=True)
            self.counters.bytes_read += fetch.wait()
        return self.cache.table(layer, self._num_experts[layer])

    def fetchable(self, layer: int, k: int) -> tuple[mx.array, mx.array, HostRecords] | None:
        """Return what a GPU needs to bring one token's experts into slots by itself.

        Experts that have been used more than those in slots are read first, now and then.

        Args:
            layer: The layer.
            k: Number of experts per token.

        Returns:
            Slot of each expert, NOT_IN_SLOT for those in none, shape (E,); k slots that hold none, shape (k,); and the
            layer's records. None if the GPU can't read them, or code on the host needs the ids.

        Raises:
            StoreError: If a record can't be read.
        """
        records = None if self.is_recording else self.cache.host_records(layer)
        if records is None:
            return None
        self._check_cancelled()
        self.settle()  # what other passes read may be evicted here, and overwritten by the GPU
        if self.is_due():
            self._promote(k)
        landing = self.cache.landing(layer, k)
        return self.cache.table(layer, self._num_experts[layer]), mx.array(landing, mx.uint32), records

    def is_due(self) -> bool:
        """Return whether so many tokens have run without the host that slots should follow what they used."""
        return self._fetched >= PROMOTION_TOKENS

    def _promote(self, k: int) -> None:
        self._fetched = 0
        fetches = [
            self.cache.promote(layer, own, k)
            for layer, own in self._own.items()
            if self.cache.num_slots(layer) < len(own)
        ]
        for fetch in fetches:
            self.counters.bytes_read += fetch.wait()

    def used(self, layers: Sequence[int], ids: mx.array, *, fetched: bool) -> None:
        """Note one token's experts that the host has not seen.

        Args:
            layers: The layers.
            ids: The experts of each, lazy. Shape (L, K).
            fetched: Whether the GPU fetched those that were in no slot; if not, all were in slots.
        """
        self._used.append((layers, ids))
        if fetched:
            self._fetched += 1
            # Those of two tokens ago have been computed, so this waits for nothing.
            self.count_used(keep=2)
        elif self._has_all:
            self.counters.hits += ids.size

    def count_used(self, keep: int = 0) -> None:
        """Report the experts of such tokens to the policies, and count those that may have been fetched.

        Args:
            keep: Number of the last tokens to leave for later.
        """
        while len(self._used) > keep:
            layers, ids = self._used.popleft()
            for layer, chosen in zip(layers, np.array(ids).tolist(), strict=True):
                own = self._own[layer]
                experts = [expert for expert in chosen if expert in own]
                misses = self.cache.used(layer, experts)
                if self.cache.num_slots(layer) < self._num_experts[layer]:
                    self.counters.hits += len(experts) - misses
                    self.counters.misses += misses
                    self.counters.bytes_read += misses * self._layouts[layer].record_bytes

    def token(self, layer: int, experts: list[int]) -> TokenFetch:
        """Start bringing one token's distinct experts into memory, for CPU kernels.

        The caller must finish computing with them before it calls this again.

        Raises:
            StoreError: If a record can't be read.
        """
        self._check_cancelled()
        self.settle()
        fetch = self.cache.acquire(layer, experts)
        self.counters.misses += len(fetch.misses)
        self.counters.hits += len(experts) - len(fetch.misses)
        return TokenFetch(fetch, self.cache.bank(layer), self.counters)

    def cancellable(self, cancelled: threading.Event) -> AbstractContextManager[None]:
        """End a forward pass of this thread early once ``cancelled`` is set, before the next group's reads.

        May be nested: any of the events ends the pass.

        Raises:
            concurrent.futures.CancelledError: From the forward pass.
        """
        return self._cancellation.by(cancelled)

    def _check_cancelled(self) -> None:
        if self._cancellation.is_set():
            raise CancelledError

    def _acquire(self, layer: int, group: PlannedGroup) -> Fetch:
        self._check_cancelled()
        self.settle()
        return self.cache.acquire(layer, group.experts, counted=True, keep=group.keep)

    def _groups(self, layer: int, planned: list[PlannedGroup], first: Fetch | None) -> Iterator[ExpertGroup]:
        fetch = first
        for group, following in itertools.zip_longest(planned, planned[1:]):
            current = self._acquire(layer, group) if fetch is None else fetch
            started = time.perf_counter()
            self.counters.bytes_read += current.wait()
            if current.misses:
                self.counters.read_seconds += time.perf_counter() - started
            fetch = self._acquire(layer, following) if following is not None and following.keep else None
            yield ExpertGroup(self.cache.bank(layer), current.slots)

    def _passing_groups(self, passing: ExpertSlots, experts: Sequence[int]) -> Iterator[ExpertGroup]:
        """Bring experts into slots that other layers use too; each half is filled while the other is computed."""
        half = passing.num_slots // 2
        groups = [
            {expert: number % 2 * half + place for place, expert in enumerate(experts[first : first + half])}
            for number, first in enumerate(range(0, len(experts), half))
        ]
        reads = [passing.receive(slots) for slots in groups[:1]]
        for slots, following in itertools.zip_longest(groups, groups[1:]):
            self._check_cancelled()
            started = time.perf_counter()
            self.counters.bytes_read += reads.pop().wait()
            self.counters.read_seconds += time.perf_counter() - started
            if following is not None:
                reads.append(passing.receive(following))
            yield ExpertGroup(passing, slots)

    def reading(self, output: mx.array) -> None:
        """Note that the lazy array ``output`` reads slots: they are not overwritten before it is evaluated."""
        self._unread = (output, threading.get_ident())

    def start_unread(self) -> None:
        """Start evaluating the last such array on the thread whose stream built it; overwriting slots waits for it."""
        if self._unread is not None:
            output, _ = self._unread
            mx.async_eval(output)
            self._unread = (output, _STARTED)

    def num_experts(self, layer: int) -> int:
        """Return how many experts of a layer are read here; 0 if there is no such layer."""
        return len(self._own.get(layer, ()))

    def settle(self) -> None:
        """Wait for the last computation that reads slots."""
        if self._unread is not None:
            output, thread = self._unread
            # If an interrupt kept it from being started, no other thread can evaluate it: forget it.
            if thread in (_STARTED, threading.get_ident()):
                mx.eval(output)
                self.count_used()
            self._used.clear()
            self._unread = None

    @property
    def is_recording(self) -> bool:
        """Whether the router's choices are being recorded in a trace."""
        return self.recorder is not None and not self.recorder.closed

    def record(self, layer: int, experts: np.ndarray, weights: mx.array | np.ndarray | None) -> None:
        """Note a router's choice, ids and weights of shape (T, K), if a trace is being recorded."""
        if self.recorder is not None and self.is_recording:
            floats = np.full(experts.shape, np.nan, np.float32) if weights is None else weights
            floats = floats.astype(mx.float32) if isinstance(floats, mx.array) else floats
            self.recorder.record(layer, experts, np.array(floats))

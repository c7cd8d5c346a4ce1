"""DistributedExperts: a layer's experts, each computed by the rank that holds it; all ranks get all outputs.

Every rank runs the same passes on its own dense weights. It reads and computes the experts of its share, with zeros in
place of the other outputs. One sum over the ranks of the outputs' bits, as integers, completes them. An output's bits
are therefore the same whichever rank computed it, and outputs are combined in the router's order, as on one host.
"""

import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..errors import DistributedError, FlashMoEError
from ..ops.expert_ffn_combine import combine_outputs
from ..ops.norm import Norm
from ..ops.slot_memory import ExpertRecords
from .cache import ExpertCache
from .cancellation import Cancellation
from .executor import ELSEWHERE, OtherRanks, PendingExperts, choice_on_host
from .local import LocalExperts, LocalResident, LocalToken
from .placement import Placement
from .ranks import RankGroup
from .read_balance import ReadBalance
from .reader import ExpertReader

if TYPE_CHECKING:
    from ..ops.cpu.vectors import Pool, Vector

_PART_WORDS = 1 << 20
"""Approximate number of values exchanged at a time, so that copies stay small."""

_REFUSED = 0

COMPILE_SECONDS = 60.0
"""Additional seconds that a rank waits for another in the first pass of each kind, which may compile kernels."""


@dataclass(eq=False)
class Share:
    """One rank's share of a model's experts.

    Attributes:
        ranks: The group.
        placement: Rank of each expert.
        is_open: Whether every rank can read every expert, and may compute those of others to balance reads.
        runs_ahead: Whether single tokens are computed without the hosts, which then don't meet before each.
    """

    ranks: RankGroup
    placement: Placement
    is_open: bool = False
    runs_ahead: bool = False
    _balance: ReadBalance | None = field(default=None, repr=False)
    _known: set[tuple[int, bool]] = field(default_factory=set, repr=False)
    _cancellation: Cancellation = field(default_factory=Cancellation, repr=False)

    @property
    def num_experts(self) -> dict[int, int]:
        """Experts of each layer, of all ranks together."""
        return {layer: len(owner) for layer, owner in self.placement.owners.items()}

    def counts(self) -> dict[int, int]:
        """Return how many experts of each layer are this rank's."""
        return self.placement.counts(self.ranks.rank)

    def experts(self) -> dict[int, list[int]]:
        """Return this rank's experts of each layer."""
        owners = self.placement.owners.items()
        return {layer: np.flatnonzero(owner == self.ranks.rank).tolist() for layer, owner in owners}

    def use(self, cache: ExpertCache) -> None:
        """Find out whether all ranks can compute single tokens without hosts, or balance reads otherwise. Collective.

        Args:
            cache: This rank's slots.

        Raises:
            DistributedError: If a rank fails or doesn't come in time.
        """
        if self.ranks.sums_on_gpu:
            alone = all(cache.host_records(layer) is not None for layer in cache.layers)
            self.runs_ahead = all(self.ranks.gather(int(alone), patient=True))
        elif self.is_open:
            self._balance = ReadBalance(
                self.placement, self.ranks.rank, lambda layer: (cache.present(layer), cache.num_slots(layer))
            )

    def own(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """Return ids, with ``ELSEWHERE`` in place of those that other ranks compute."""
        ranks = self.placement.owners[layer] if self._balance is None else self._balance.ranks_of(layer, ids)
        return np.where(ranks[ids] == self.ranks.rank, ids, ELSEWHERE)

    @contextmanager
    def beginning(self, batch: int, tokens: int, length: int) -> Iterator[None]:
        """Make room for a pass, then wait until all ranks have done so for the same pass.

        Args:
            batch: Number of sequences. These three must be the same on all ranks.
            tokens: New tokens per sequence.
            length: Tokens of context at the end of the pass.

        Raises:
            DistributedError: If a rank couldn't make room, fails, doesn't come in time or begins another pass.
        """
        if self.runs_ahead and batch == tokens == 1:
            yield  # a rank that doesn't come is noticed on the side channel
            return
        ranks, shape = self.ranks, (batch, tokens, length)
        kind = batch, tokens > 1
        ranks.allowance = 0.0 if kind in self._known else COMPILE_SECONDS
        self._known.add(kind)
        try:
            yield
        except FlashMoEError:
            with suppress(DistributedError):
                ranks.gather(_REFUSED)
            raise
        found = ranks.gather(zlib.crc32(repr(shape).encode()) | 1)
        if _REFUSED in found:
            raise DistributedError(
                f"[rank {ranks.rank} of {ranks.size}] all ranks must begin the pass, got a refusal of rank "
                f"{found.index(_REFUSED)}. See its own message."
            )
        if len(set(found)) > 1:
            ranks.fail(f"began a pass of (batch, tokens, length) = {shape}, another rank another pass")
            ranks.check()

    def agreed(self, tokens: mx.array) -> mx.array:
        """Return rank 0's token ids; the others' are dropped.

        Raises:
            DistributedError: If a rank fails or doesn't come in time.
        """
        own = np.array(tokens).astype(np.uint32)
        words = own if self.ranks.rank == 0 else np.zeros_like(own)
        return mx.array(self.ranks.sum(words.reshape(-1)).reshape(own.shape)).astype(tokens.dtype)

    def cancellable(self, cancelled: threading.Event) -> AbstractContextManager[None]:
        """End a forward pass of this thread, and of all other ranks, at the next exchange once ``cancelled`` is set.

        Raises:
            concurrent.futures.CancelledError: From the forward pass, on every rank.
        """
        return self._cancellation.by(cancelled)

    def exchange(self, layer: int, ids: np.ndarray, own: np.ndarray, y: np.ndarray) -> None:
        """Complete outputs in place.

        Args:
            layer: The layer.
            ids: The router's choice. Shape (N,).
            own: The same with ``ELSEWHERE``. Shape (N,).
            y: Output of each, of which those elsewhere may hold anything. Shape (N, H), float32.

        Raises:
            CancelledError: If a rank's pass has been cancelled.
            DistributedError: If a rank fails or doesn't come, or its router chose other experts.
        """
        rows = max(_PART_WORDS // y.shape[1], 1)
        for start in range(0, len(y), rows):
            part = slice(start, start + rows)
            bits = y[part].view(np.uint32)
            balance = self._balance if start + rows >= len(y) else None
            rest = np.zeros(0, np.uint32) if balance is None else balance.words(layer)
            words = np.concatenate([np.zeros(bits.size, np.uint32), self._check_words(layer, ids[part]), rest])
            words[: bits.size].reshape(bits.shape)[own[part] != ELSEWHERE] = bits[own[part] != ELSEWHERE]
            total, checks, rest = np.split(self.ranks.sum(words), [bits.size, bits.size + 2])
            if balance is not None:
                balance.learn(layer, rest)
            self._check_sums(layer, checks)
            bits[:] = total.reshape(bits.shape)

    def exchange_on_gpu(self, layer: int, ids: np.ndarray, y: mx.array) -> mx.array:
        """Return complete outputs, exchanged from GPU to GPU.

        Args:
            layer: The layer.
            ids: The router's choice. Shape (T, K).
            y: Output of each, zero for those elsewhere. Shape (T, K, H), float32.

        Raises:
            CancelledError: If a rank's pass has been cancelled.
            DistributedError: If the group has failed, or another rank's router chose other experts.
        """
        self.ranks.check()
        words = self.ranks.words_on_gpu(mx.array(self._check_words(layer, ids)))
        total = self.ranks.sum_on_gpu(y)
        del y  # its memory may become that of the sum
        mx.eval(words, total)
        self._check_sums(layer, np.array(words))
        return total

    def _check_words(self, layer: int, ids: np.ndarray) -> np.ndarray:
        """Return whether this rank's pass is cancelled, and a word that sums to zero if all ranks chose the same."""
        choice = zlib.crc32(np.ascontiguousarray(ids, np.int64).tobytes(), layer)
        against = (choice * (self.ranks.size - 1) if self.ranks.rank == 0 else -choice) % (1 << 32)
        return np.array([self._cancellation.is_set(), against], np.uint32)

    def _check_sums(self, layer: int, sums: np.ndarray) -> None:
        if sums[1]:
            self.ranks.fail(f"found that routers of layer {layer} chose other experts on other ranks")
            self.ranks.check()
        if sums[0]:
            raise CancelledError


class DistributedExperts:
    """ExpertExecutor of one layer over all ranks."""

    def __init__(self, reader: ExpertReader, layer: int, local: LocalExperts, share: Share):
        """Bind a layer.

        Args:
            reader: Brings this rank's experts into slots.
            layer: The layer's number.
            local: Computes this rank's experts.
            share: Who keeps what.
        """
        self._reader = reader
        self._layer = layer
        self._local = local
        self._share = share

    def begin(
        self,
        ids: mx.array | np.ndarray,
        weights: mx.array | None = None,
        *,
        alongside: Sequence[mx.array] = (),
        traced: bool = True,
    ) -> "DistributedPending":
        """Start reading this rank's share of what is missing: see `ExpertExecutor.begin`."""
        chosen = choice_on_host(ids, weights, alongside).astype(np.int64)
        own = self._share.own(self._layer, chosen)
        pending = self._local.begin(own, traced=False)
        if traced:
            self._reader.record(self._layer, chosen, weights)
        return DistributedPending(self._reader, self._layer, pending, self._share, chosen, own)

    def resident(self, k: int) -> "DistributedResident | None":
        """Return the experts if GPUs exchange outputs without their hosts: see `ExpertExecutor.resident`."""
        local = self._local.resident(k) if self._share.runs_ahead else None
        return None if local is None else DistributedResident(local, self._share, self._layer)

    def token_experts(self, x: "Vector", y: np.ndarray, pool: "Pool") -> "DistributedToken":
        """Build the operations that compute one token's experts on the CPU: see `ExpertExecutor.token_experts`."""
        return DistributedToken(self._layer, self._local.token_experts(x, y, pool), self._share, y)


class DistributedResident:
    """ResidentExperts of which other ranks' GPUs compute a part."""

    def __init__(self, local: LocalResident, share: Share, layer: int):
        self._local, self.layer = local, layer
        own = share.placement.owners[layer] == share.ranks.rank
        self.slots, self.landing, self.target, self.records = local.slots, local.landing, local.target, local.records
        # Experts of others are computed as if they were in the first slot, and their outputs dropped.
        self.table = mx.where(mx.array(own), local.table, 0)
        self.others = OtherRanks(mx.array(own), share.ranks.sum_on_gpu)
        mx.eval(self.table, self.others.own)

    def is_current(self) -> bool:
        """Return whether nothing has changed: see `ResidentExperts.is_current`."""
        return self._local.is_current()

    def used(self, layers: Sequence[int], ids: mx.array, *, fetched: bool) -> None:
        """Note one token's choices: see `ResidentExperts.used`."""
        self._local.used(layers, ids, fetched=fetched)

    def reading(self, output: mx.array) -> None:
        """Note that ``output`` reads slots: see `ResidentExperts.reading`."""
        self._local.reading(output)


class DistributedPending:
    """PendingExperts of which other ranks compute a part."""

    def __init__(
        self,
        reader: ExpertReader,
        layer: int,
        pending: PendingExperts,
        share: Share,
        ids: np.ndarray,
        own: np.ndarray,
    ):
        self._layout = reader.layout(layer)
        self._layer = layer
        self._pending = pending
        self._share = share
        self._ids, self._own = ids, own

    def run(self, x: mx.array, norm: Norm | None = None) -> mx.array:
        """Compute each token's experts: see `PendingExperts.run`.

        Raises:
            DistributedError: If a rank fails or doesn't come in time.
        """
        if self._share.ranks.sums_on_gpu:
            return self._share.exchange_on_gpu(self._layer, self._ids, self._pending.run(x, norm))
        y = np.array(self._pending.run(x, norm))
        self._share.exchange(self._layer, self._ids.reshape(-1), self._own.reshape(-1), y.reshape(-1, y.shape[-1]))
        return mx.array(y)

    def combined(
        self,
        x: mx.array,
        weights: mx.array,
        shared: mx.array | ExpertRecords,
        shared_gate: mx.array,
        residual: mx.array,
        norm: Norm | None = None,
    ) -> mx.array:
        """Combine the experts' outputs: see `PendingExperts.combined`."""
        y = self.run(x, norm)
        return combine_outputs(y, x, self._layout, weights, shared, shared_gate, residual, norm)


class DistributedToken:
    """TokenExperts of which other ranks compute a part."""

    exchanges = True

    def __init__(self, layer: int, local: LocalToken, share: Share, y: np.ndarray):
        self._layer = layer
        self._local = local
        self._share = share
        self._y = y
        self._ids = self._own = np.zeros(0, np.int64)
        self.present, self.missing = local.present, local.missing

    def begin(self, ids: np.ndarray, weights: np.ndarray) -> bool:
        """Start reading this rank's share of what is missing: see `TokenExperts.begin`."""
        self._ids = ids.copy()
        self._own = self._share.own(self._layer, ids)
        return self._local.begin(self._own, weights, traced=ids)

    def finish(self) -> None:
        """Wait for the missing experts: see `TokenExperts.finish`."""
        self._local.finish()

    def exchange(self) -> None:
        """Send this rank's outputs and receive the others'.

        Raises:
            DistributedError: If a rank fails or doesn't come in time.
        """
        self._share.exchange(self._layer, self._ids, self._own, self._y)

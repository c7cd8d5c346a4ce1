"""LocalExperts: a layer's routed experts, streamed into slots of this process and computed there.

Results do not depend on which experts are in memory: an expert is always computed in one go on all tokens of the
forward pass that chose it, whichever group it arrives in, and outputs are combined in the router's order.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..ops.backend import use_cpu_kernels
from ..ops.expert_batch import expert_ffn_grouped
from ..ops.expert_ffn import expert_ffn
from ..ops.expert_ffn_combine import combine_outputs, expert_ffn_combine
from ..ops.fetch_records import HostRecords, halves_of
from ..ops.norm import Norm
from ..ops.numerics import Activation
from ..ops.slot_memory import ExpertRecords
from .executor import ELSEWHERE, OtherRanks, choice_on_host
from .reader import ExpertGroup, ExpertReader, TokenFetch
from .slots import PAIRWISE_TOKENS

if TYPE_CHECKING:
    from ..ops.cpu.expert_program import RecordOperations
    from ..ops.cpu.vectors import Pool, Vector


class LocalExperts:
    """ExpertExecutor of one layer that uses this process's slots. Holds no weights."""

    def __init__(self, reader: ExpertReader, layer: int, activation: Activation | None = None):
        """Bind a layer.

        Args:
            reader: Reader that brings experts into slots.
            layer: The layer's number.
            activation: Activation between up and down projection, instead of SwiGLU.
        """
        self._reader = reader
        self._layer = layer
        self._activation = activation

    def begin(
        self,
        ids: mx.array | np.ndarray,
        weights: mx.array | None = None,
        *,
        alongside: Sequence[mx.array] = (),
        traced: bool = True,
    ) -> "LocalPending | LocalTokenPending":
        """Start reading the missing experts: see `ExpertExecutor.begin`."""
        host_ids = choice_on_host(ids, weights, alongside)
        if (
            len(host_ids) == 1
            and self._activation is None
            and not use_cpu_kernels()
            and not (host_ids == ELSEWHERE).any()
        ):
            fetch = self._reader.token(self._layer, host_ids[0].tolist())
            if traced:
                self._reader.record(self._layer, host_ids, weights)
            return LocalTokenPending(self._reader, self._layer, host_ids[0].tolist(), fetch)
        groups = self._reader.groups(self._layer, *_distinct(host_ids), len(host_ids))
        if traced:
            self._reader.record(self._layer, host_ids, weights)
        return LocalPending(self._reader, self._layer, self._activation, host_ids, groups)

    def resident(self, k: int) -> "LocalResident | None":
        """Return the experts if a GPU needs no host to use them: see `ExpertExecutor.resident`."""
        if self._activation is not None:
            return None
        table = self._reader.table(self._layer)
        if table is not None:
            return LocalResident(self._reader, self._layer, table)
        found = self._reader.fetchable(self._layer, k)
        return None if found is None else LocalResident(self._reader, self._layer, *found)

    def token_experts(self, x: "Vector", y: np.ndarray, pool: "Pool") -> "LocalToken":
        """Build the operations that compute one token's experts on the CPU: see `ExpertExecutor.token_experts`."""
        return LocalToken(self._reader, self._layer, x, y, pool)


class LocalResident:
    """ResidentExperts over the slots of one layer."""

    def __init__(
        self,
        reader: ExpertReader,
        layer: int,
        table: mx.array,
        landing: mx.array | None = None,
        records: HostRecords | None = None,
    ):
        self._reader, self.layer = reader, layer
        self._changes = reader.cache.changes
        self.slots = reader.cache.bank(layer)
        self.table, self.landing, self.records = table, landing, records
        self.target = halves_of(self.slots.address)
        self.others: OtherRanks | None = None

    def is_current(self) -> bool:
        """Return whether nothing has changed: see `ResidentExperts.is_current`."""
        reader = self._reader
        unchanged = reader.cache.changes == self._changes and not reader.is_recording
        return unchanged and (self.records is None or not reader.is_due())

    def used(self, layers: Sequence[int], ids: mx.array, *, fetched: bool) -> None:
        """Note one token's choices: see `ResidentExperts.used`."""
        self._reader.used(layers, ids, fetched=fetched)

    def reading(self, output: mx.array) -> None:
        """Note that ``output`` reads slots: see `ResidentExperts.reading`."""
        self._reader.reading(output)


class LocalPending:
    """PendingExperts whose experts arrive in slots group by group."""

    def __init__(
        self,
        reader: ExpertReader,
        layer: int,
        activation: Activation | None,
        ids: np.ndarray,
        groups: Iterator[ExpertGroup],
    ):
        self._reader = reader
        self._layout = reader.layout(layer)
        self._activation = activation
        self._ids = ids
        self._groups = groups

    def run(self, x: mx.array, norm: Norm | None = None) -> mx.array:
        """Compute each token's experts: see `PendingExperts.run`."""
        if len(self._ids) <= PAIRWISE_TOKENS:
            return self._by_pair(x, norm)
        return self._by_expert(x if norm is None else norm.reference(x))

    def combined(
        self,
        x: mx.array,
        weights: mx.array,
        shared: mx.array | ExpertRecords,
        shared_gate: mx.array,
        residual: mx.array,
        norm: Norm | None = None,
    ) -> mx.array:
        """Combine the experts' outputs, in one operation if all experts are in one group. The bits are the same."""
        if len(self._ids) <= PAIRWISE_TOKENS and self._activation is None:
            first = list(islice(self._groups, 1))
            slots = _slot_table(first[0].slots, self._ids) if first else None
            if slots is not None and (slots >= 0).all():
                table = mx.array(slots.astype(np.uint32))
                y = expert_ffn_combine(x, first[0].bank, table, weights, shared, shared_gate, residual, norm)
                self._reader.reading(y)
                return y
            self._groups = chain(first, self._groups)
        y = self.run(x, norm)
        return combine_outputs(y, x, self._layout, weights, shared, shared_gate, residual, norm)

    def _by_pair(self, x: mx.array, norm: Norm | None) -> mx.array:
        ids, y = self._ids, self._outputs()
        for group in self._groups:
            slots = _slot_table(group.slots, ids)
            if (slots >= 0).all():
                y = expert_ffn(x, group.bank, mx.array(slots.astype(np.uint32)), self._activation, norm)
                self._reader.reading(y)
                return y
            tokens, ranks = np.nonzero(slots >= 0)
            pairs = mx.array(slots[tokens, ranks].astype(np.uint32)[:, None])
            part = expert_ffn(x[mx.array(tokens)], group.bank, pairs, self._activation, norm)
            y[mx.array(tokens * ids.shape[1] + ranks)] = part[:, 0]
            mx.eval(y)
        return y.reshape(*ids.shape, self._layout.hidden_size)

    def _by_expert(self, x: mx.array) -> mx.array:
        ids, y = self._ids, self._outputs()
        order = np.argsort(ids, axis=None, kind="stable")
        experts, starts = np.unique(ids.reshape(-1)[order], return_index=True)
        pairs = dict(zip(experts.tolist(), np.split(order, starts[1:]), strict=True))
        for group in self._groups:
            own = [pairs[expert] for expert in group.slots]
            y = expert_ffn_grouped(y, x, group.bank, list(group.slots.values()), own, ids.shape[1], self._activation)
        return y.reshape(*ids.shape, self._layout.hidden_size)

    def _outputs(self) -> mx.array:
        return mx.zeros((self._ids.size, self._layout.hidden_size), dtype=mx.float32)


class LocalTokenPending:
    """PendingExperts of one token on a GPU: waits for all experts and computes them in one operation."""

    def __init__(self, reader: ExpertReader, layer: int, experts: Sequence[int], fetch: TokenFetch):
        self._reader, self._fetch = reader, fetch
        self._bank = reader.cache.bank(layer)
        self._slots = mx.array([fetch.slots_of(experts)], mx.uint32)

    def run(self, x: mx.array, norm: Norm | None = None) -> mx.array:
        """Compute the token's experts: see `PendingExperts.run`."""
        self._fetch.wait()
        y = expert_ffn(x, self._bank, self._slots, norm=norm)
        self._reader.reading(y)
        return y

    def combined(
        self,
        x: mx.array,
        weights: mx.array,
        shared: mx.array | ExpertRecords,
        shared_gate: mx.array,
        residual: mx.array,
        norm: Norm | None = None,
    ) -> mx.array:
        """Combine the experts' outputs in one operation: see `PendingExperts.combined`."""
        self._fetch.wait()
        y = expert_ffn_combine(x, self._bank, self._slots, weights, shared, shared_gate, residual, norm)
        self._reader.reading(y)
        return y


class LocalToken:
    """TokenExperts over slots: one set of operations for cached experts, one for experts just read."""

    exchanges = False
    present: "RecordOperations"
    missing: "RecordOperations"

    def __init__(self, reader: ExpertReader, layer: int, x: "Vector", y: np.ndarray, pool: "Pool"):
        from ..ops.cpu.expert_program import routed_experts

        self._reader = reader
        self._layer = layer
        layout, k = reader.layout(layer), len(y)
        self.present = routed_experts("hits", layout, x, k, y, pool)
        self.missing = routed_experts("misses", layout, x, k, y, pool)
        self._fetch: TokenFetch | None = None
        self._late: tuple[list[int], list[int]] = ([], [])

    def begin(self, ids: np.ndarray, weights: np.ndarray, traced: np.ndarray | None = None) -> bool:
        """Start reading the missing experts: see `TokenExperts.begin`.

        Args:
            ids: The router's choice. Shape (K,), int64.
            weights: The weights of that choice. Shape (K,), float32.
            traced: Ids to note in a trace instead of ``ids``. Shape (K,).
        """
        experts = ids.tolist()
        ranks: Sequence[int] = range(len(experts))
        if ELSEWHERE in experts:
            ranks = [rank for rank in ranks if experts[rank] != ELSEWHERE]
            experts = [experts[rank] for rank in ranks]
        fetch = self._reader.token(self._layer, experts)
        records = fetch.addresses(experts)
        self._reader.record(self._layer, (ids if traced is None else traced)[None], weights[None])
        if not fetch.misses:
            self.present.set(records, ranks)
            return False
        self._fetch = fetch
        absent = set(fetch.misses)
        places = range(len(experts))
        here = [place for place in places if experts[place] not in absent]
        late = [place for place in places if experts[place] in absent]
        self.present.set([records[place] for place in here], [ranks[place] for place in here])
        self._late = [records[place] for place in late], [ranks[place] for place in late]
        return True

    def finish(self) -> None:
        """Wait for the missing experts: see `TokenExperts.finish`."""
        # Kept no longer: it holds a layer's slots, which a resize or close is to free.
        fetch, self._fetch = self._fetch, None
        assert fetch is not None
        fetch.wait()
        self.missing.set(*self._late)

    def exchange(self) -> None:
        """Do nothing: this process computes all outputs."""


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ids computed here, in ascending order, and how often each occurs."""
    experts, counts = np.unique(ids, return_counts=True)
    own = experts != ELSEWHERE
    return experts[own], counts[own]


def _slot_table(slots: Mapping[int, int], ids: np.ndarray) -> np.ndarray:
    """Return the slot of each id, or -1 if the id is not in the group."""
    return np.array([[slots.get(e, -1) for e in row] for row in ids.tolist()], dtype=np.int64)

"""Replays a routing trace over several hosts that share the experts, to predict reads and speed."""

from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from ..experts.placement import Placement
from ..experts.policies import AgedLFU
from ..experts.slots import SlotTable
from ..experts.trace import DECODE, NOT_RECORDED, RoutingTrace


@dataclass(frozen=True)
class HostReplay:
    """A replay of decoded tokens over hosts.

    Attributes:
        hosts: Number of hosts.
        longest_reads: Mean reads per token of the host that reads most, summed over layers.
        busiest_experts: Mean experts per token of the host that computes most, summed over layers.
        hit_rate: Hit rate over all hosts' experts.
        microseconds: Time per token.
    """

    hosts: int
    longest_reads: float
    busiest_experts: float
    hit_rate: float
    microseconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of decode."""
        return 1e6 / self.microseconds


def replay_hosts(
    trace: RoutingTrace,
    hosts: int,
    slots: int,
    *,
    read_us: float,
    layer_us: float,
    link_us: float,
    by_heat: bool = False,
    replicas: int = 0,
) -> HostReplay:
    """Replay the second half of a trace's decoded tokens; the first half fills the slots and provides the uses.

    A layer takes ``layer_us``, the reads of the host that has most of them, and 2 (N - 1) messages of a ring's sum.

    Args:
        trace: Recorded routing.
        hosts: Number of hosts, N.
        slots: Number of experts of each layer that each host has in memory.
        read_us: Microseconds to read one expert on one host.
        layer_us: Microseconds to compute one layer.
        link_us: Microseconds per message between neighbours.
        by_heat: Whether to balance the load of the first half, instead of placing experts by number.
        replicas: Number of each layer's hottest experts that every host holds; the least busy one computes them.

    Raises:
        RequestError: If a layer has fewer experts than hosts, slots are too few, or nothing was decoded.
    """
    decoded = np.flatnonzero(trace.phase == DECODE)
    half = len(decoded) // 2
    if half == 0:
        raise RequestError("[simulate] the trace must have decoded tokens, got none. Record an answer.")
    counts = dict.fromkeys(trace.layers, trace.num_experts)
    heat = {layer: _heat(trace, column, decoded[:half]) for column, layer in enumerate(trace.layers)}
    placement = Placement.by_heat(heat, hosts) if by_heat else Placement.by_number(counts, hosts)
    longest, busiest = np.zeros(len(decoded), np.int64), np.zeros(len(decoded), np.int64)
    hits = asked = 0
    for column, layer in enumerate(trace.layers):
        owner = placement.owners[layer]
        everywhere = set(np.argsort(-heat[layer], kind="stable")[:replicas].tolist()) if hosts > 1 else set()
        tables = [SlotTable(slots, AgedLFU()) for _ in range(hosts)]
        for place, token in enumerate(decoded):
            ids = trace.experts[token, column]
            shares = _shares(ids[ids != NOT_RECORDED].tolist(), owner, everywhere, hosts)
            reads = [_reads(table, share, slots) for table, share in zip(tables, shares, strict=True)]
            longest[place] += max(reads)
            busiest[place] += max(map(len, shares))
            if place >= half:
                asked += sum(map(len, shares))
                hits += sum(map(len, shares)) - sum(reads)
    mean = float(longest[half:].mean())
    messages = 2 * (hosts - 1)
    microseconds = mean * read_us + len(trace.layers) * (layer_us + messages * link_us)
    return HostReplay(hosts, mean, float(busiest[half:].mean()), hits / max(asked, 1), microseconds)


def _heat(trace: RoutingTrace, column: int, tokens: np.ndarray) -> np.ndarray:
    ids = trace.experts[tokens, column]
    return np.bincount(ids[ids != NOT_RECORDED], minlength=trace.num_experts)


def _shares(ids: list[int], owner: np.ndarray, everywhere: set[int], hosts: int) -> list[list[int]]:
    """Assign one token's experts to hosts; those that all hosts hold come last."""
    shares: list[list[int]] = [[] for _ in range(hosts)]
    for expert in ids:
        if expert not in everywhere:
            shares[int(owner[expert])].append(expert)
    for expert in ids:
        if expert in everywhere:
            min(shares, key=len).append(expert)
    return shares


def _reads(table: SlotTable, experts: list[int], slots: int) -> int:
    if not experts:
        return 0
    if len(experts) > slots:
        raise RequestError(f"[simulate] a layer needs at least {len(experts)} slots, got {slots}. Use more.")
    ordered, hits = table.order(experts)
    table.claim(ordered)
    table.publish()
    return len(ordered) - hits

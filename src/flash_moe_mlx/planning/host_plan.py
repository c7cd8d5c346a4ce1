"""Predicts what each of several hosts that share a model's experts needs, and the speed that follows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RequestError
from ..experts.budget import Budget
from ..experts.placement import Placement
from ..experts.trace import RoutingTrace
from ..formats.packed_format import PAGE_BYTES, round_up
from ..stats import format_bytes, format_rate
from .hosts import replay_hosts
from .planner import Expectation, Planner

LINK_US = 40.0
"""Default microseconds per message between two hosts."""


@dataclass(frozen=True)
class HostPlan:
    """Needs of the host that stores most of N, and the speed of all of them together.

    Attributes:
        hosts: Number of hosts, N.
        disk_bytes: Size of its packed share: all dense weights, and its experts unchanged.
        smallest_limit_bytes: Smallest memory limit that works on it.
        num_experts: Number of experts that it stores.
        budget: Division of the memory limit; None if the limit is too small.
        expectations: Expected decode performance; ``missed_bytes`` are those of the host that reads most.
    """

    hosts: int
    disk_bytes: int
    smallest_limit_bytes: int
    num_experts: int
    budget: Budget | None
    expectations: tuple[Expectation, ...]

    @property
    def num_slots(self) -> int:
        """Total number of expert slots on this host; 0 if the limit is too small."""
        return sum(self.budget.num_slots.values()) if self.budget else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible values."""
        return {
            "hosts": self.hosts,
            "fits": self.budget is not None,
            "disk_bytes": self.disk_bytes,
            "smallest_limit_bytes": self.smallest_limit_bytes,
            "num_experts": self.num_experts,
            "num_slots": self.num_slots,
            "expectations": [asdict(expectation) for expectation in self.expectations],
        }


def plan_hosts(planner: Planner, hosts: int, link_us: float = LINK_US) -> HostPlan:
    """Predict N hosts that each have the planner's limit and speed, with experts dealt out by number.

    A token takes, summed over layers, the reads of the host that reads most, its computation, and the 2 (N - 1)
    messages of a ring's sum.

    Args:
        planner: The model, and the limit and speed of one host.
        hosts: Number of hosts, N.
        link_us: Microseconds per message between neighbours.

    Raises:
        RequestError: If ``hosts`` is less than 1, or a layer has fewer experts.
    """
    if not 1 <= hosts <= min(planner.num_experts.values()):
        raise RequestError(
            f"[hosts] must be from 1 to the {min(planner.num_experts.values())} experts of a layer, got {hosts}. "
            "Use fewer hosts."
        )
    placement = Placement.by_number(planner.num_experts, hosts)
    own = max(map(placement.counts, range(hosts)), key=lambda counts: sum(counts.values()))
    smallest = planner.smallest(own)
    disk = planner.stored_dense_bytes + sum(
        count * round_up(planner.payload_bytes[layer], PAGE_BYTES) for layer, count in own.items()
    )
    budget = planner.divide(planner.limit_bytes, own) if planner.limit_bytes >= smallest else None
    expectations: tuple[Expectation, ...] = ()
    if budget is not None:
        expectations = tuple(_expect(planner, kind, hosts, link_us, budget, own) for kind in planner.kinds)
    return HostPlan(hosts, disk, smallest, sum(own.values()), budget, expectations)


def _expect(
    planner: Planner, kind: str, hosts: int, link_us: float, budget: Budget, own: dict[int, int]
) -> Expectation:
    """Replay each kind of layer once; layers with equal numbers of experts and slots are alike."""
    missed = computed = hits = asked = 0.0
    replays: dict[tuple[int, int, bool], tuple[float, float, float]] = {}
    for layer, slots in budget.num_slots.items():
        count = planner.num_experts[layer]
        key = count, slots, slots >= own[layer]
        if key not in replays:
            replays[key] = _replay(planner.routing(kind, count), hosts, slots, is_resident=key[2])
        reads, busiest, hit_rate = replays[key]
        missed += reads * planner.payload_bytes[layer]
        computed += busiest * planner.payload_bytes[layer]
        hits += hit_rate * min(planner.k, count)
        asked += min(planner.k, count)
    seconds = planner.speed.token_seconds(planner.work.with_expert_bytes(round(computed)), missed)
    if seconds is not None:
        seconds += len(budget.num_slots) * 2 * (hosts - 1) * link_us * 1e-6
    return Expectation(kind, hits / asked, missed, None if seconds is None else 1 / seconds)


def _replay(trace: RoutingTrace, hosts: int, slots: int, *, is_resident: bool) -> tuple[float, float, float]:
    """Return, per layer, the reads of the host that reads most and the experts of the busiest, and the hit rate."""
    found = replay_hosts(trace, hosts, slots, read_us=0, layer_us=1, link_us=0)
    layers = len(trace.layers)
    if is_resident:
        return 0.0, found.busiest_experts / layers, 1.0
    return found.longest_reads / layers, found.busiest_experts / layers, found.hit_rate


def hosts_table(plans: Sequence[HostPlan]) -> list[list[str]]:
    """Return plans as rows of cells, the first of which is the head."""
    kinds = next((plan.expectations for plan in plans if plan.expectations), ())
    rows = [["hosts", "disk each", "smallest limit", "slots each", *(f"{e.routing} routing" for e in kinds)]]
    for plan in plans:
        figures = [f"{e.hit_rate:.0%}, {_rate(e.tokens_per_second)}" for e in plan.expectations]
        slots = f"{plan.num_slots:,} of {plan.num_experts:,}" if plan.budget else "does not fit"
        cells = [str(plan.hosts), format_bytes(plan.disk_bytes), format_bytes(plan.smallest_limit_bytes), slots]
        rows.append([*cells, *(figures or [""] * len(kinds))])
    return rows


def _rate(rate: float | None) -> str:
    return "speed unknown" if rate is None else f"{format_rate(rate)} tok/s"

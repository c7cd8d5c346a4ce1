"""Replays a routing trace through slots and a policy to get the engine's hit rate without a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from ..experts.policies import LRU, AgedLFU, Belady, Policy
from ..experts.slots import SlotTable, plan_groups
from ..experts.trace import DECODE, PREFILL, RoutingTrace

PolicyMaker = Callable[[Sequence[Sequence[int]]], Policy]

POLICIES: dict[str, PolicyMaker] = {
    "lfu": lambda _: AgedLFU(),
    "lru": lambda _: LRU(),
    "belady": Belady,
}
"""Policy factories by name. Each creates one layer's policy from its future requests, which only Belady's uses."""


@dataclass(frozen=True)
class Replay:
    """Counts of a replay.

    Attributes:
        layers: Layer numbers of the model.
        hits, misses: Requested experts that were, and were not, in memory. Shape (2, layers): prefill, decode.
        tokens: Number of tokens in prefill and in decode.
    """

    layers: tuple[int, ...]
    hits: np.ndarray
    misses: np.ndarray
    tokens: tuple[int, int]

    @property
    def hit_rate(self) -> float:
        """Hit rate of prefill and decode together, counted like the engine's: once per layer and forward pass."""
        return _share(self.hits.sum(), self.misses.sum())

    @property
    def decode_hit_rate(self) -> float:
        """Hit rate of decoded tokens only."""
        return _share(self.hits[DECODE].sum(), self.misses[DECODE].sum())

    @property
    def decode_misses_per_token(self) -> float:
        """Number of records read per decoded token."""
        return float(self.misses[DECODE].sum()) / max(self.tokens[DECODE], 1)


def _share(hits: float, misses: float) -> float:
    return float(hits) / float(hits + misses) if hits + misses else 0.0


def replay(
    trace: RoutingTrace, num_slots: Mapping[int, int] | int, policy: str | PolicyMaker = "lfu", skip_passes: int = 0
) -> Replay:
    """Count the hits and misses of a trace, starting with empty slots.

    Args:
        trace: Routing trace.
        num_slots: Slots by layer number, or one number for all layers.
        policy: Name in POLICIES, or a factory that creates a layer's policy from its requests.
        skip_passes: Initial passes per layer that fill the slots and are not counted.

    Raises:
        RequestError: If the policy is unknown, or there are too few slots for a decoded token.
    """
    if isinstance(policy, str) and policy not in POLICIES:
        raise RequestError(f"[simulate] policy must be one of {', '.join(POLICIES)}, got {policy!r}. Use one of these.")
    make = POLICIES[policy] if isinstance(policy, str) else policy
    counted = np.zeros((2, 2, len(trace.layers)), np.int64)
    for column, layer in enumerate(trace.layers):
        slots = num_slots if isinstance(num_slots, int) else num_slots.get(layer, 0)
        requests = list(trace.requests(column))
        least = max((len(experts) for experts, _, tokens, _ in requests if tokens == 1), default=1)
        if slots < least:
            raise RequestError(f"[simulate] layer {layer} needs at least {least} slots, got {slots}. Use more.")
        table = SlotTable(slots, make([experts for experts, _, _, _ in requests]))
        for number, (experts, counts, tokens, phase) in enumerate(requests):
            ordered, hits = table.order(experts, counts, tokens)
            for group in plan_groups(ordered, hits, slots, tokens):
                table.claim(*group)
                table.publish()
            if number >= skip_passes:
                counted[:, phase, column] += hits, len(ordered) - hits
    decoded = int((trace.phase == DECODE).sum())
    if skip_passes:
        decoded = int((trace.phase[int(trace.passes[:skip_passes].sum()) :] == DECODE).sum())
    return Replay(trace.layers, counted[0], counted[1], (int((trace.phase == PREFILL).sum()), decoded))

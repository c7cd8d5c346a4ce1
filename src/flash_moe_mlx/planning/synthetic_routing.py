"""Synthetic routing traces with given locality, for testing policies and plans.

Real routing is local: a session uses only some of the experts, some of them far more than others, and a token often
picks the same experts as the previous one. The defaults imitate the two available real traces (docs/performance.md);
uniform routing is the worst case.
"""

from dataclasses import dataclass

import numpy as np

from ..experts.trace import DECODE, PREFILL, RoutingTrace


@dataclass(frozen=True)
class Locality:
    """Parameters of how concentrated routing is.

    Attributes:
        zipf: Exponent of Zipf's law over the experts of the session; 0 is uniform.
        support: Share of all experts that the session uses.
        sticky: Probability that an expert of the previous token is picked again.
        drift: Probability per token and layer that one expert of the session is replaced by one outside it.
        spread: Maximum deviation of a layer's exponent from ``zipf``.
    """

    zipf: float = 1.0
    support: float = 0.5
    sticky: float = 0.2
    drift: float = 0.02
    spread: float = 0.0


LOCAL = Locality()
UNIFORM = Locality(zipf=0.0, support=1.0, sticky=0.0, drift=0.0)


def make_routing(
    locality: Locality,
    *,
    layers: int,
    num_experts: int,
    num_experts_per_tok: int,
    prompt_tokens: int = 0,
    tokens: int = 512,
    turns: int = 1,
    seed: int = 0,
) -> RoutingTrace:
    """Generate the routing of a conversation: in each turn, a prompt in one forward pass, then decoded tokens.

    Args:
        locality: How concentrated the routing is.
        layers: Number of layers with experts.
        num_experts: E.
        num_experts_per_tok: K.
        prompt_tokens: Length of each turn's prompt.
        tokens: Decoded tokens per turn.
        turns: Number of turns.
        seed: Random seed; the same seed gives the same trace.
    """
    rng = np.random.default_rng(seed)
    k = num_experts_per_tok
    used = min(max(k, round(locality.support * num_experts)), num_experts)
    exponents = locality.zipf + locality.spread * np.linspace(-1, 1, layers)
    weights = np.full((layers, num_experts), -np.inf)
    for layer in range(layers):
        weights[layer, rng.permutation(num_experts)[:used]] = -exponents[layer] * np.log(np.arange(1, used + 1))
    total = turns * (prompt_tokens + tokens)
    experts = np.empty((total, layers, k), np.int16)
    for token in range(total):
        for layer in np.flatnonzero(rng.random(layers) < locality.drift).tolist() if used < num_experts else ():
            inside, outside = (
                rng.choice(np.flatnonzero(np.isfinite(weights[layer]) == kind)) for kind in (True, False)
            )
            weights[layer, [inside, outside]] = weights[layer, [outside, inside]]
        # Sample without replacement, by the Gumbel trick.
        keys = weights + rng.gumbel(size=weights.shape)
        if token:
            kept, places = np.nonzero(rng.random((layers, k)) < locality.sticky)
            keys[kept, experts[token - 1, kept, places]] = np.inf
        experts[token] = np.argpartition(-keys, k - 1, axis=1)[:, :k]
    of_turn = [PREFILL] * prompt_tokens + [DECODE] * tokens
    passes = [prompt_tokens] * (prompt_tokens > 0) + [1] * tokens
    return RoutingTrace(
        experts=experts,
        phase=np.array(of_turn * turns, np.uint8),
        layers=tuple(range(layers)),
        num_experts=num_experts,
        passes=np.array(passes * turns),
    )

"""Routing made up by parameters, in the form of a trace: what policies and plans are tried on.

Real routing is local: a session uses a part of the experts, some far more than others, and a token often picks what
the one before it picked. The defaults imitate the two real traces at hand (docs/performance.md); uniform routing is
the worst case.
"""

from dataclasses import dataclass

import numpy as np

from ..experts.trace import DECODE, PREFILL, RoutingTrace


@dataclass(frozen=True)
class Locality:
    """How concentrated routing is.

    Attributes:
        zipf: Exponent of Zipf's law over the experts of the session; 0 is uniform.
        support: Share of all experts that the session uses.
        sticky: Probability that an expert of the token before is picked again.
        drift: Probability, each token and layer, that one expert of the session is replaced by one outside it.
        spread: Layers differ: their exponents are ``zipf`` give or take at most this.
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
    """Routing of a conversation: ``turns`` times a prompt, each one forward pass, and then decoded tokens.

    Args:
        locality: How concentrated.
        layers: Layers with experts.
        num_experts: E.
        num_experts_per_tok: K.
        prompt_tokens: Of each turn's prompt.
        tokens: Decoded in each turn.
        turns: How often.
        seed: Same seed, same trace.
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
        # Drawing without replacement, by Gumbel's trick.
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

"""Hit rates of eviction policies in simulation: kinds of routing x share of experts in memory x policy.

    python -m benchmarks.policies                                    # made-up routing, several seeds
    python -m benchmarks.policies --shares                           # layers' shares by their misses
    python -m benchmarks.policies --traces ../shared/data/routing/*.npz   # recorded routing

Prints one tab-separated line a case, hit rates of decoded tokens in per cent, after what fills the slots; then the
policies' means, and by how much each falls short of LRU where it falls short most.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from flash_moe_mlx.experts.policies import LRU, AgedLFU, Belady
from flash_moe_mlx.experts.trace import DECODE, RoutingTrace
from flash_moe_mlx.planning.simulation import PolicyMaker, replay
from flash_moe_mlx.planning.synthetic_routing import LOCAL, UNIFORM, Locality, make_routing

LAYERS, TOKENS, EXPERTS, K = 3, 600, 256, 8
SHARES = (0.08, 0.19, 0.375, 0.75)
POLICIES: dict[str, PolicyMaker] = {
    "lru": lambda _: LRU(),
    **{
        f"lfu {half}/{fresh:.2f}": lambda _, half=half, fresh=fresh: AgedLFU(half, fresh)
        for half, fresh in ((32, 1), (16, 1 / 4), (32, 1 / 4), (64, 1 / 4))
    },
    "belady": Belady,
}
LOCALITIES: dict[str, Locality] = {
    "uniform": UNIFORM,
    "local": LOCAL,
    "weak": replace(LOCAL, zipf=0.6, support=0.8),
    "sharp": replace(LOCAL, zipf=1.4),
    "sticky": replace(LOCAL, sticky=0.5),
    "drifting": replace(LOCAL, drift=0.1),
    "drifting fast": replace(LOCAL, drift=0.5),
    "layers differ": replace(LOCAL, spread=0.6),
}


def made(locality: Locality, seed: int, experts: int = EXPERTS, k: int = K, **how: int) -> RoutingTrace:
    how = {"tokens": TOKENS} | how
    return make_routing(locality, layers=LAYERS, num_experts=experts, num_experts_per_tok=k, seed=seed, **how)


def joined(parts: list[RoutingTrace]) -> RoutingTrace:
    return replace(
        parts[0],
        experts=np.concatenate([p.experts for p in parts]),
        phase=np.concatenate([p.phase for p in parts]),
        passes=np.concatenate([p.passes for p in parts]),
    )


def in_turn(seed: int) -> RoutingTrace:
    """Return routing that picks all experts one after the other, repeatedly."""
    experts = (np.arange(TOKENS * K) % EXPERTS).reshape(TOKENS, 1, K).repeat(LAYERS, axis=1)
    return replace(made(UNIFORM, seed), experts=experts)


def repeated(seed: int) -> RoutingTrace:
    """Return routing of the same 40 tokens, repeatedly."""
    return joined([made(UNIFORM, seed, tokens=40)] * (TOKENS // 40))


CASES: dict[str, Callable[[int], RoutingTrace]] = {
    **{name: lambda seed, how=locality: made(how, seed) for name, locality in LOCALITIES.items()},
    "subjects change": lambda seed: joined([made(LOCAL, 10 * seed + i, tokens=TOKENS // 4) for i in range(4)]),
    "prefill bursts": lambda seed: made(LOCAL, seed, prompt_tokens=128, tokens=60, turns=8),
    "128 experts, K 6": lambda seed: made(LOCAL, seed, 128, 6),
    "512 experts, K 10": lambda seed: made(LOCAL, seed, 512, 10),
    "40 tokens repeated": repeated,
    "experts in turn": in_turn,
}


def slots_of(trace: RoutingTrace, share: float) -> int:
    return max(trace.experts.shape[2] + 1, round(share * trace.num_experts))


def policies(seeds: int) -> None:
    print("routing\tin memory\t" + "\t".join(POLICIES))
    against_lru: dict[str, list[float]] = {name: [] for name in POLICIES}
    for case, make in CASES.items():
        traces = [make(seed) for seed in range(seeds)]
        for share in SHARES:
            rates = {}
            for name, policy in POLICIES.items():
                runs = [replay(t, slots_of(t, share), policy, skip_passes=60).decode_hit_rate for t in traces]
                rates[name] = 100 * statistics.mean(runs)
                against_lru[name].append(rates[name] - rates["lru"])
            cells = "\t".join(f"{rate:.1f}" for rate in rates.values())
            print(f"{case}\t{share:.0%}\t{cells}", flush=True)
    for name, gains in against_lru.items():
        print(f"# {name}: {statistics.mean(gains):+.2f} points of LRU in the mean, at worst {min(gains):+.2f}")


def recorded(paths: list[Path]) -> None:
    print("trace\tin memory\t" + "\t".join(POLICIES))
    for path in paths:
        trace = RoutingTrace.read(path)
        for slots in sorted({slots_of(trace, share) for share in (0.0625, 0.125, 0.19, 0.25, 0.375, 0.5, 0.75)}):
            rates = [replay(trace, slots, p).decode_hit_rate for p in POLICIES.values()]
            cells = "\t".join(f"{100 * rate:.1f}" for rate in rates)
            print(f"{path.stem}\t{slots / trace.num_experts:.1%}\t{cells}", flush=True)


def hits_by_slots(trace: RoutingTrace, grid: list[int]) -> np.ndarray:
    """Return the hits of each layer with 0 to E slots, interpolated linearly. Shape (layers, E + 1)."""
    points = np.array([np.zeros(len(trace.layers)), *(replay(trace, slots).hits[DECODE] for slots in grid)])
    every = np.arange(trace.num_experts + 1)
    return np.array([np.interp(every, [0, *grid], points[:, layer]) for layer in range(len(trace.layers))])


def by_gain(hits: np.ndarray, total: int, least: int) -> list[int]:
    """Return the slots per layer, given pair by pair to the layer that gains most."""
    slots = [least] * len(hits)
    while sum(slots) + 2 <= total:
        gains = [of[min(n + 2, len(of) - 1)] - of[n] for of, n in zip(hits, slots, strict=True)]
        slots[int(np.argmax(gains))] += 2
    return slots


def cut(trace: RoutingTrace, start: int, stop: int) -> RoutingTrace:
    phase, experts = trace.phase[start:stop], trace.experts[start:stop]
    return replace(trace, experts=experts, phase=phase, passes=np.ones(len(phase), int))


def shares(paths: list[Path]) -> None:
    """Compare equal shares with shares learned on the first half of the tokens, and with hindsight on the second."""
    traces = {"layers differ": make_routing(LOCALITIES["layers differ"], layers=12, num_experts=128,
                                            num_experts_per_tok=6, tokens=400)}  # fmt: skip
    for path in paths:
        trace = RoutingTrace.read(path)
        traces[path.stem] = cut(trace, int((trace.phase != DECODE).sum()), len(trace.phase))
    print("routing\tin memory\tequal\tlearned\thindsight")
    for name, trace in traces.items():
        tokens, k = trace.experts.shape[0], trace.experts.shape[2]
        grid = [n for n in (k, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128) if n >= k]
        curves = {
            "learned": hits_by_slots(cut(trace, 0, tokens // 2), grid),
            "hindsight": hits_by_slots(cut(trace, tokens // 2, tokens), grid),
        }
        for share in (0.08, 0.125, 0.19, 0.25, 0.375):
            equal = slots_of(trace, share)
            divided = {"equal": [equal] * len(trace.layers)}
            for way, hits in curves.items():
                divided[way] = by_gain(hits, equal * len(trace.layers), k)
            rates = [
                replay(trace, dict(zip(trace.layers, slots, strict=True)), skip_passes=tokens // 2).decode_hit_rate
                for slots in divided.values()
            ]
            print(f"{name}\t{share:.1%}\t" + "\t".join(f"{100 * rate:.1f}" for rate in rates), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", action="store_true", help="compare divisions of the slots among the layers")
    parser.add_argument("--traces", type=Path, nargs="*", default=[], help="recorded routing")
    arguments = parser.parse_args()
    if arguments.shares:
        shares(arguments.traces)
    elif arguments.traces:
        recorded(arguments.traces)
    else:
        policies(arguments.seeds)


if __name__ == "__main__":
    main()

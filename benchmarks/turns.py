"""How many experts answers read that take turns of a number of tokens: a recorded trace, replayed through the slots.

    python -m benchmarks.turns TRACE.npz --share 0.33

Each client decodes the recorded tokens, the first as they are, the others with another random numbering of each layer's
experts: the same locality, and nothing in common but what chance gives. Prints misses per token, one line per number of
clients; "shared" is one pass for all of them.
"""

import argparse
from pathlib import Path

import numpy as np

from flash_moe_mlx.experts.trace import DECODE, NOT_RECORDED, RoutingTrace
from flash_moe_mlx.planning.simulation import replay


def renumbered(experts: np.ndarray, num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Give each layer's experts other numbers. Shape (tokens, layers, K)."""
    numbers = np.stack([rng.permutation(num_experts) for _ in range(experts.shape[1])])
    other = numbers[np.arange(experts.shape[1])[:, None], experts]
    return np.where(experts == NOT_RECORDED, NOT_RECORDED, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--share", type=float, default=0.33, help="share of the experts that have slots")
    parser.add_argument("--clients", type=int, action="append")
    parser.add_argument("--turn", type=int, action="append", help="tokens; may be given several times")
    arguments = parser.parse_args()
    trace, rng = RoutingTrace.read(arguments.trace), np.random.default_rng(0)
    recorded = trace.experts[trace.phase == DECODE]
    tokens, slots = len(recorded), round(arguments.share * trace.num_experts)
    turns = arguments.turn or [tokens, 64, 32, 16, 8, 4, 1]
    print("clients", *turns, "shared", sep="\t")
    for count in arguments.clients or [2, 4, 8]:
        clients = [recorded] + [renumbered(recorded, trace.num_experts, rng) for _ in range(count - 1)]
        figures = []
        for turn in [*turns, None]:
            if turn is None:
                order, passes = np.stack(clients, 1).reshape(-1, *recorded.shape[1:]), np.full(tokens, count)
            else:
                parts = [client[start : start + turn] for start in range(0, tokens, turn) for client in clients]
                order, passes = np.concatenate(parts), np.ones(count * tokens, np.int64)
            phase = np.full(len(order), DECODE, np.uint8)
            played = replay(RoutingTrace(order, phase, trace.layers, trace.num_experts, passes), slots)
            figures.append(played.misses.sum() / len(order))
        print(count, *(f"{figure:.1f}" for figure in figures), sep="\t")


if __name__ == "__main__":
    main()

"""Guess the next layer's experts by its router and the present hidden state: recall, and reading them early simulated.

    python -m benchmarks.next_layer                                        # the embedded demo
    python -m benchmarks.next_layer --model CHECKPOINT                     # another model of our own code
    python -m benchmarks.next_layer --traces ../shared/data/routing/*.npz  # recorded routing, guesses made up

Guesses are made at two moments: "early", when layer l's router runs (from that router's own input, before l's experts
are computed), and "late", from layer l's output. The late one misses the time of l's experts, taken as half a layer's.

The simulated machine has one disk and one processor. A layer's misses are read one after another once its router has
run, then the layer computes for a fixed time while the disk idles. The next router runs. Reading one record takes as
long as makes the plain engine wait for a given share of its time (65 %: 35B dimensions at 1.3 GB/s). Guessed records
that are absent are read in that idle time into room of their own, best guess first; one under way when the next router
runs is finished before the first true miss. "greedy" starts a read whenever the disk is idle; "in time" only if
it ends before the next router runs; "weighed" if the share of it that is then done is above the share of early reads so
far that were for nothing. A record that is not used is dropped, so the cache's content is the plain engine's.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe_mlx import load
from flash_moe_mlx.experts.policies import AgedLFU
from flash_moe_mlx.experts.slots import SlotTable, plan_groups
from flash_moe_mlx.experts.trace import DECODE, RoutingTrace
from flash_moe_mlx.models.moe_block import StreamingMoE

from .policies import slots_of
from .record_routing import DEMO, conversations

WAITING = (0.5, 0.65, 0.8)
SHARES = (0.125, 0.25, 0.375, 0.5)
WAYS = ("greedy", "in time", "weighed")
LATE = 0.5
"""Share of a layer's computing time after which the late guess is known."""

WARM_TOKENS = 200


@dataclass(frozen=True)
class Observed:
    """Routing of a text.

    Attributes:
        experts: Ids, shape (tokens, layers, K).
        guesses: By moment: the 2K likeliest experts of each layer but the first, best first. Shape
            (tokens, layers - 1, 2K).
        num_experts: E.
    """

    experts: np.ndarray
    guesses: dict[str, np.ndarray]
    num_experts: int


class _Watched(StreamingMoE):
    """A block that keeps the inputs and the output of its last call."""

    def __call__(self, x: mx.array, residual: mx.array, rows: mx.array | None = None) -> mx.array:
        output = super().__call__(x, residual, rows)
        object.__setattr__(self, "seen", (x, residual, output))
        return output


def likeliest(gate: Any, x: mx.array, count: int) -> np.ndarray:
    """Ids of the ``count`` experts of highest logit, best first. Shape (tokens, count)."""
    logits = np.array(gate(x.reshape(-1, x.shape[-1])).astype(mx.float32))
    return np.argsort(-logits, axis=-1, kind="stable")[:, :count]


def observe(model: Any, texts: list[list[int]]) -> Observed:
    """Run texts, each from an empty context, and compare the routers' choices with guesses of them."""
    layers = [layer for layer in model.layers if isinstance(layer.mlp, StreamingMoE)]
    k = layers[0].mlp.num_experts_per_tok
    experts, guesses = [], {"early": [], "late": []}
    for layer in layers:
        layer.mlp.__class__ = _Watched
    for text in texts:
        model(mx.array([text]), logits_to_keep=1)
        chosen = [likeliest(layer.mlp.gate, layer.mlp.seen[0], k) for layer in layers]
        experts.append(np.stack(chosen, axis=1))
        for moment, part in (("early", 1), ("late", 2)):
            named = [
                likeliest(after.mlp.gate, after.post_attention_layernorm(before.mlp.seen[part]), 2 * k)
                for before, after in pairwise(layers)
            ]
            guesses[moment].append(np.stack(named, axis=1))
    every = {moment: np.concatenate(parts) for moment, parts in guesses.items()}
    return Observed(np.concatenate(experts), every, layers[0].mlp.gate(layers[0].mlp.seen[0][:1, :1]).shape[-1])


def recall(guesses: np.ndarray, experts: np.ndarray, wanted: np.ndarray | None = None) -> float:
    """Share of experts (of those ``wanted``) that are among the guesses."""
    named = (experts[..., :, None] == guesses[..., None, :]).any(-1)
    return float(named.mean() if wanted is None else named[wanted].mean())


def misses_of(experts: np.ndarray, slots: int) -> np.ndarray:
    """Return which experts are absent when they are asked for, by the engine's own policy. Shape of ``experts``."""
    tokens, layers, _ = experts.shape
    absent = np.zeros(experts.shape, bool)
    for layer in range(layers):
        table = SlotTable(slots, AgedLFU())
        for token in range(tokens):
            asked = experts[token, layer].tolist()
            absent[token, layer] = [expert not in table.present for expert in asked]
            ordered, hits = table.order(asked)
            for group in plan_groups(ordered, hits, slots, 1):
                table.claim(*group)
                table.publish()
    return absent


def present_before(experts: np.ndarray, slots: int) -> Iterator[list[set[int]]]:
    """Yield the experts in memory, layer by layer, before each token."""
    tables = [SlotTable(slots, AgedLFU()) for _ in range(experts.shape[1])]
    for token in experts:
        yield [set(table.present) for table in tables]
        for table, asked in zip(tables, token.tolist(), strict=True):
            ordered, hits = table.order(asked)
            for group in plan_groups(ordered, hits, slots, 1):
                table.claim(*group)
                table.publish()


def seconds(
    needed: list[list[list[int]]],
    absent_guesses: list[list[list[int]]] | None,
    read: float,
    way: str = "greedy",
    known_after: float = 0.0,
) -> tuple[float, int, int]:
    """Return the time of all tokens, in layers' computing times, and how many records were read early, and used.

    Args:
        needed: Misses by token and layer.
        absent_guesses: Guessed records to read early, by token and layer (the first layer's are empty); None for none.
        read: Time to read one record.
        way: When to start an early read; one of WAYS.
        known_after: Computing time of a layer before the guesses for the next one are known.
    """
    now = free = 0.0  # the processor's time, and when the disk is free
    early = used = 0
    for token, layers in enumerate(needed):
        arrived: set[int] = set()
        flying: int | None = None  # read early, and not there yet when the router runs
        for layer, misses in enumerate(layers):
            left = [expert for expert in misses if expert not in arrived]
            used += len(misses) - len(left)
            start = max(now, free)
            if flying in left:
                used += 1
                left.remove(flying)
                now = start
            if left:
                now = free = start + read * len(left)
            end = now + 1.0
            arrived, flying = set(), None
            if absent_guesses is not None and layer + 1 < len(layers):
                at = max(now + known_after, free)
                for guess in absent_guesses[token][layer + 1]:
                    done = (end - at) / read  # share of it that is read when the next router runs
                    wrong = 1 - (used + 1) / (early + 2)
                    if done <= {"greedy": 0.0, "in time": 1 - 1e-9, "weighed": min(wrong, 1 - 1e-9)}[way]:
                        break
                    at += read
                    early += 1
                    if at <= end:
                        arrived.add(guess)
                    else:
                        flying = guess
                free = at
            now = end
    return now, early, used


def simulate(name: str, experts: np.ndarray, guesses: dict[str, np.ndarray], num_experts: int) -> None:
    """Print a line per share of experts in memory, share of time waiting, moment, guesses read, and way."""
    tokens, layers, k = experts.shape
    trace = RoutingTrace(experts, np.full(tokens, DECODE), tuple(range(layers)), num_experts, np.ones(tokens, int))
    for slots in sorted({slots_of(trace, share) for share in SHARES}):
        absent = misses_of(experts, slots)[WARM_TOKENS:]
        asked = experts[WARM_TOKENS:]
        needed = [
            [row[gone].tolist() for row, gone in zip(*pair, strict=True)] for pair in zip(asked, absent, strict=True)
        ]
        present = list(present_before(experts, slots))[WARM_TOKENS:]
        misses = int(absent.sum())
        for waiting in WAITING:
            read = waiting / (1 - waiting) * len(needed) * layers / max(misses, 1)
            plain = seconds(needed, None, read)[0]
            cells = []
            for moment, named in guesses.items():
                for count in (k, 2 * k):
                    candidates = [
                        [
                            [],
                            *(
                                [g for g in row[:count] if g not in held]
                                for row, held in zip(rows, holds[1:], strict=True)
                            ),
                        ]
                        for rows, holds in zip(named[WARM_TOKENS:].tolist(), present, strict=True)
                    ]
                    for way in WAYS:
                        known = LATE if moment == "late" else 0.0
                        took, early, used = seconds(needed, candidates, read, way, known)
                        share = used / early if early else math.nan
                        cells.append(f"{100 * (plain / took - 1):+.1f} ({share:.0%} used)")
            print(
                f"{name}\t{slots}/{num_experts}\t{1 - misses / asked.size:.1%}\t{waiting:.0%}\t" + "\t".join(cells),
                flush=True,
            )


def head(moments: list[str], k: int) -> str:
    cells = [f"{moment}, {count} guesses, {way}" for moment in moments for count in (k, 2 * k) for way in WAYS]
    return "routing\tin memory\thit rate\twaiting\t" + "\t".join(cells)


def trained(path: Path, count: int, limit: str) -> None:
    model, tokenizer = load(path, memory_limit=limit, max_context=1024)
    with model.streaming:
        texts = [prompt + answer for prompt, answer in conversations(tokenizer, count)]
        found = observe(model, texts)
    tokens, layers, k = found.experts.shape
    after = found.experts[:, 1:]
    print(f"# {path.name}: {tokens} tokens, {layers} layers, {found.num_experts} experts, K {k}")
    print(
        "layer\t"
        + "\t".join(f"{moment} at {n}" for moment in found.guesses for n in (k, 2 * k))
        + f"\tlast token's {k}"
    )
    for layer in [*range(layers - 1), None]:
        part = slice(None) if layer is None else slice(layer, layer + 1)
        cells = [recall(g[:, part, :n], after[:, part]) for g in found.guesses.values() for n in (k, 2 * k)]
        cells.append(recall(after[:-1, part], after[1:, part]))
        print(f"{'all' if layer is None else layer + 1}\t" + "\t".join(f"{100 * cell:.1f}" for cell in cells))
    slots = max(k + 1, found.num_experts // 2)
    wanted = misses_of(found.experts, slots)[:, 1:]
    cells = [recall(g[..., :n], after, wanted) for g in found.guesses.values() for n in (k, 2 * k)]
    print(f"misses, {slots} slots\t" + "\t".join(f"{100 * cell:.1f}" for cell in cells))
    chance = [n / found.num_experts for n in (k, 2 * k)] * 2
    print("by chance\t" + "\t".join(f"{100 * cell:.1f}" for cell in chance))
    print(head(list(found.guesses), k))
    simulate(path.name, found.experts, found.guesses, found.num_experts)


def made_up(experts: np.ndarray, num_experts: int, right: float, seed: int = 0) -> np.ndarray:
    """Guesses that name each expert with a probability, in random order among wrong ones."""
    rng = np.random.default_rng(seed)
    tokens, layers, k = experts.shape
    guesses = np.empty((tokens, layers - 1, 2 * k), int)
    for token in range(tokens):
        for layer in range(1, layers):
            own = experts[token, layer]
            named = own[rng.random(k) < right]
            others = rng.permutation(np.setdiff1d(np.arange(num_experts), own))
            first = rng.permutation(np.concatenate([named, others[: k - len(named)]]))
            guesses[token, layer - 1] = np.concatenate([first, others[k - len(named) :][:k]])
    return guesses


def recorded(paths: list[Path]) -> None:
    for path in paths:
        trace = RoutingTrace.read(path)
        experts = trace.experts[(trace.experts >= 0).all((1, 2))]
        guesses = {f"{right:.0%} right": made_up(experts, trace.num_experts, right) for right in (0.7, 0.8, 0.9)}
        global WARM_TOKENS
        WARM_TOKENS = min(WARM_TOKENS, int((trace.phase != DECODE).sum()))
        print(head(list(guesses), experts.shape[2]))
        simulate(path.stem, experts, guesses, trace.num_experts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--memory-limit", default="400MB")
    parser.add_argument("--traces", type=Path, nargs="*", default=[], help="recorded routing; guesses are made up")
    arguments = parser.parse_args()
    if arguments.traces:
        recorded(arguments.traces)
    else:
        trained(arguments.model, arguments.conversations, arguments.memory_limit)


if __name__ == "__main__":
    main()

"""Several clients at once against the same clients one after the other: total tok/s and bytes read per token.

    python -m benchmarks.clients                                        # the embedded model
    python -m benchmarks.clients CHECKPOINT --memory-limit 2GB --tokens 16

Runs what `flash-moe serve --max-concurrent N` runs, without HTTP. Sides alternate; the slots are empty before each run,
and --cold drops the checkpoint's pages too. Prompts are timed. `--way` forces shared passes or turns. Prints one line a
run, then medians, and the ratio of neighbouring runs. A checkpoint without a tokenizer gets one of random words.
"""

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import flash_moe_mlx
from flash_moe_mlx import load_model, stream_generate
from flash_moe_mlx.runtime.batching import Batch, Member, Outcome
from flash_moe_mlx.runtime.generation import begin_answer

from .batches import drop_pages
from .structured import DEMO, random_words

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_TOKENS = 2
COLUMNS = "clients\tside\ttok_s\tMB_per_token\thit_rate\tshared_passes\tdifferent"


class CountingBatch(Batch):
    """A batch that counts tokens and shared passes."""

    shared = passes = 0

    def _decode_together(self, members: Any) -> list[Outcome]:
        self.shared += 1
        return super()._decode_together(members)

    def _decode(self, members: Any) -> list[Outcome]:
        self.passes += len(members) > 1
        return super()._decode(members)


def in_turn(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    return [[r.token for r in stream_generate(model, tokenizer, p, tokens, progress=False)] for p in prompts]


def at_once(batch: Batch, model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    members = [batch.add(begin_answer(model, tokenizer, prompt, tokens)) for prompt in prompts]
    received: dict[Member, list[int]] = defaultdict(list)
    while len(batch):
        for outcome in batch.step():
            if outcome.error is not None or outcome.response is None:
                raise outcome.error or RuntimeError("no token")
            received[outcome.member].append(outcome.response.token)
    return [received[member] for member in members]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--memory-limit", default="1GB")
    parser.add_argument("--max-context", type=int, default=256)
    parser.add_argument("--clients", type=int, action="append", help="may be given several times")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the shortest prompt; the longest has 7 more")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--io", default="auto")
    parser.add_argument("--way", choices=["auto", "together", "turns"], default="auto")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each run")
    arguments = parser.parse_args()

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    model = load_model(
        arguments.model, memory_limit=arguments.memory_limit, max_context=arguments.max_context, io=arguments.io
    )
    if (arguments.model / "tokenizer.json").exists():
        tokenizer = flash_moe_mlx.load(arguments.model, memory_limit=arguments.memory_limit, max_context=64)[1]
    else:
        tokenizer = random_words(model.vocabulary_size)
    tokenizer.eos_token_ids = set()
    rng = np.random.default_rng(0)
    vocabulary = min(model.vocabulary_size, len(tokenizer))
    batch = CountingBatch(model, together={"auto": None, "together": True, "turns": False}[arguments.way])
    with model.streaming as engine:
        stats = engine.stats()
        print(
            f"# commit {commit.stdout.strip() or 'unknown'}, {platform.machine()} {platform.system()}, "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {mx.default_device()}"
        )
        print(
            f"# {arguments.model}, {'cold' if arguments.cold else 'warm'}, {stats.io}, {stats.num_slots} of "
            f"{stats.num_experts} experts in slots, {arguments.tokens} tokens each, {arguments.way}"
        )
        print(COLUMNS)
        ratios: dict[int, list[float]] = defaultdict(list)
        results: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
        for run in range(arguments.runs + 1):  # the first one, a short one, compiles what is compiled on first use
            tokens = arguments.tokens if run else min(arguments.tokens, WARM_UP_TOKENS)
            for clients in arguments.clients or [2, 4, 8]:
                prompts = [rng.integers(1, vocabulary, arguments.prompt + i % 8).tolist() for i in range(clients)]
                answers, speeds = [], []
                for side in ("one at a time", "at once"):
                    if arguments.cold:
                        drop_pages(arguments.model)
                    engine.clear()
                    before, started = engine.counters.copy(), time.perf_counter()
                    batch.shared = batch.passes = 0
                    if side == "at once":
                        answers.append(at_once(batch, model, tokenizer, prompts, tokens))
                    else:
                        answers.append(in_turn(model, tokenizer, prompts, tokens))
                    seconds, count = time.perf_counter() - started, clients * tokens
                    done = engine.counters.since(before)
                    speeds.append(count / seconds)
                    if run:
                        results[clients, side].append((speeds[-1], done.bytes_read / count / 1e6))
                    different = sum(a != b for one, two in zip(answers[0], answers[-1], strict=True)
                                    for a, b in zip(one, two, strict=True))  # fmt: skip
                    megabytes = done.bytes_read / count / 1e6
                    print(
                        f"{clients}\t{side}\t{speeds[-1]:.3g}\t{megabytes:.3g}\t{done.hit_rate:.3f}\t"
                        f"{batch.shared} of {batch.passes}\t{different} of {count}{'' if run else '  (warm-up)'}",
                        flush=True,
                    )
                if run:
                    ratios[clients].append(speeds[1] / speeds[0])
    print("# medians")
    for (clients, side), figures in results.items():
        speed, megabytes = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{clients}\t{side}\t{speed:.3g} tok/s\t{megabytes:.3g} MB per token")
    for clients, values in ratios.items():
        middle, least, greatest = statistics.median(values), min(values), max(values)
        print(f"{clients}\tat once / one at a time\t{middle:.2f} ({least:.2f} to {greatest:.2f})")


if __name__ == "__main__":
    main()

"""Decode throughput against the number of sequences at once: each expert is read once a step for all of them.

    python benchmarks/batches.py                          # the embedded model
    python benchmarks/batches.py PATH --memory-limit 8GB --batch 1 --batch 16 --cold

Prints one tab-separated line a run, sides alternating, then the medians. The slots are empty at the start of every
run; --cold also drops the checkpoint's pages before it. Prefill, one sequence after the other, is not timed.
"""

import argparse
import os
import platform
import statistics
import subprocess
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe_mlx import load_model, system

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = "batch\ttok_s\ttok_s_a_sequence\texperts_a_token\tMB_a_token\thit_rate\tread_share"


def drop_pages(model: Path) -> None:
    """Ask the system to forget the checkpoint's pages."""
    for path in model.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        system.drop_pages(descriptor)
        os.close(descriptor)


def prefilled(model: Any, prompts: np.ndarray) -> list[Any]:
    """Return the caches of all prompts in the form of mlx-lm's batches."""
    each = []
    for length, prompt in enumerate(prompts.tolist(), start=1):
        caches = model.make_cache()
        # Sequences of different lengths, as they are in practice.
        mx.eval(model(mx.array([prompt[: 8 + length % 8]]), cache=caches, logits_to_keep=1))
        mx.eval([cache.state for cache in caches])
        each.append(caches)
    return [layer[0].merge(list(layer)) for layer in zip(*each, strict=True)]


def measure(model: Any, batch: int, steps: int) -> tuple[float, ...]:
    """Return the figures of one run, in the order of COLUMNS."""
    vocabulary = min(model.config.vocab_size, 1 << 16)
    rng = np.random.default_rng(batch)
    caches = prefilled(model, rng.integers(1, vocabulary, (batch, 16)))
    tokens = mx.array(rng.integers(1, vocabulary, (batch, 1)))
    model.streaming.clear()
    before = model.streaming.counters.copy()
    started = time.perf_counter()
    for _ in range(steps):
        tokens = mx.argmax(model(tokens, cache=caches)[:, -1], axis=-1, keepdims=True)
        mx.eval(tokens)
    seconds = time.perf_counter() - started
    done = model.streaming.counters.since(before)
    count = batch * steps
    return (
        batch,
        count / seconds,
        steps / seconds,
        (done.hits + done.misses) / count,
        done.bytes_read / count / 1e6,
        done.hit_rate,
        done.read_seconds / seconds,
    )


def line(figures: tuple[float, ...]) -> str:
    return f"{figures[0]:.0f}\t" + "\t".join(f"{value:.3g}" for value in figures[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=Path(str(files("flash_moe_mlx") / "demo")))
    parser.add_argument("--memory-limit", default="1GB")
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--batch", type=int, action="append", help="may be given several times")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--io", default="auto")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each run")
    arguments = parser.parse_args()

    batches = arguments.batch or [1, 2, 4, 8]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    model = load_model(
        arguments.model, memory_limit=arguments.memory_limit, max_context=arguments.max_context, io=arguments.io
    )
    with model.streaming as streaming:
        measure(model, max(batches), 2)  # compiles what is compiled on first use, and takes the largest batch's scratch
        stats = streaming.stats()
        print(
            f"# commit {commit.stdout.strip() or 'unknown'}, {platform.machine()} {platform.system()}, "
            f"{os.cpu_count()} cores, {mx.default_device()}"
        )
        print(
            f"# {arguments.model}, {'cold' if arguments.cold else 'warm'}, {stats.io}, {stats.num_slots} of "
            f"{stats.num_experts} experts in slots, K {model.config.num_experts_per_tok}, {arguments.steps} steps"
        )
        print(COLUMNS)
        runs: dict[int, list[tuple[float, ...]]] = {batch: [] for batch in batches}
        for _ in range(arguments.runs):
            for batch in batches:
                if arguments.cold:
                    drop_pages(arguments.model)
                runs[batch].append(measure(model, batch, arguments.steps))
                print(line(runs[batch][-1]), flush=True)
    print("# medians")
    for of_one in runs.values():
        print(line(tuple(statistics.median(column) for column in zip(*of_one, strict=True))))


if __name__ == "__main__":
    main()

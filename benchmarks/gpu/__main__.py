"""Time decode and prompts of a checkpoint on a GPU.

    python -m benchmarks.gpu CHECKPOINT [--slots all|half|fewest|SHARE] [--experts-per-tok K] [--prompt 2048] [--runs 5]
    python -m benchmarks.gpu CHECKPOINT --ranks 2

Prints one JSON object per line: tokens per second (median, minimum and maximum of the runs), hit rate and memory. With
``--ranks``, one process per GPU shares the experts through NCCL, and rank 0 prints. The last line is a checksum of the
logits of a few tokens, which are the same bits however many ranks and slots there are.
Write a checkpoint of true dimensions with benchmarks.synthetic first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe_mlx.errors import MemoryLimitError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.runtime.loading import load_model

WARM_TOKENS = 8
SHARES = {"all": 1.0, "half": 0.5, "fewest": 0.0}


def slots_limit(path: Path, share: float, ranks: int, **arguments: Any) -> int:
    """Return the limit of the GPU's memory that gives a share of each rank's experts a slot, K of a layer at least."""
    try:
        load_model(path, gpu_memory_limit=1, shard=False, **arguments)
    except MemoryLimitError as error:
        smallest = error.smallest_limit_bytes or 0
    checkpoint = Checkpoint.open(path)
    k = arguments["num_experts_per_tok"] or checkpoint.config["text_config"]["num_experts_per_tok"]
    return smallest + sum(
        max(int(share * checkpoint.num_experts(layer) / ranks) - k, 0) * checkpoint.layout(layer).record_bytes
        for layer in checkpoint.moe_layers
    )


def start_ranks(ranks: int) -> int:
    """Run this command once per GPU; return the first exit code that is not 0."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]],
            env={
                **os.environ, "MLX_RANK": str(rank), "MLX_WORLD_SIZE": str(ranks), "NCCL_HOST_IP": "127.0.0.1",
                "NCCL_PORT": "12345", "NCCL_NVLS_ENABLE": "0", "CUDA_VISIBLE_DEVICES": str(rank),
            },
        )
        for rank in range(ranks)
    ]  # fmt: skip
    return next((code for code in [process.wait() for process in processes] if code), 0)


def checksum(model: Any) -> int:
    """Return a checksum of the logits of a prompt's last token and of four that follow."""
    cache, total = model.make_cache(), 0
    tokens = np.random.default_rng(1).integers(0, model.vocabulary_size, (1, 40))
    for part in (tokens[:, :36], *np.split(tokens[:, 36:], 4, axis=1)):
        logits = model(mx.array(part), cache=cache, logits_to_keep=1)
        total = zlib.crc32(np.array(logits.astype(mx.float32)).tobytes(), total)
    return total


def decode(model: Any, cache: list[Any], rng: np.random.Generator, tokens: int) -> float:
    """Return seconds per token; each token is built while the last one runs, as in generation."""
    vocabulary, last = model.vocabulary_size, None
    started = time.perf_counter()
    for _ in range(tokens):
        # Random tokens: greedy ones of a random model fall into a cycle, whose experts stay in slots.
        logits = model(mx.array([[int(rng.integers(vocabulary))]]), cache=cache)
        chosen = mx.argmax(logits[:, -1:], axis=-1)
        mx.async_eval(chosen)
        if last is not None:
            last.item()
        last = chosen
    if last is not None:
        last.item()
    return (time.perf_counter() - started) / tokens


def prompt(model: Any, ids: mx.array) -> float:
    """Return seconds of a prompt, its states and the last logits included."""
    cache = model.make_cache()
    started = time.perf_counter()
    logits = model(ids, cache=cache, logits_to_keep=1)
    mx.eval(logits, [each.state for each in cache])
    return time.perf_counter() - started


def report(what: str, per: Callable[[float], float], seconds: list[float], **figures: Any) -> None:
    rates = [per(each) for each in seconds]
    rounded = {name: round(value, 2) for name, value in (
        ("median", statistics.median(rates)), ("min", min(rates)), ("max", max(rates)))}  # fmt: skip
    print(json.dumps({"what": what, "tok/s": rounded, "runs": len(rates), **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--slots", type=lambda text: SHARES[text] if text in SHARES else float(text), default=1.0, help="such as 0.18"
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpu-memory-limit", help="such as 20GB, in place of --slots")
    parser.add_argument("--memory-limit", default="110GB")
    parser.add_argument("--experts-per-tok", type=int)
    parser.add_argument("--io", choices=("auto", "direct", "pread", "mmap"), default="auto")
    parser.add_argument("--prompt", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=48, help="per run")
    parser.add_argument("--runs", type=int, default=5)
    a = parser.parse_args()
    if a.ranks > 1 and "MLX_RANK" not in os.environ:
        sys.exit(start_ranks(a.ranks))
    how = {
        "memory_limit": a.memory_limit, "num_experts_per_tok": a.experts_per_tok, "max_context": 4096, "io": a.io,
    }  # fmt: skip
    if a.gpu_memory_limit or a.slots == 1:
        limit = a.gpu_memory_limit or "130GB"
    else:
        limit = slots_limit(a.checkpoint, a.slots, a.ranks, **how)
    started = time.perf_counter()
    model = load_model(a.checkpoint, gpu_memory_limit=limit, **how)
    loaded = time.perf_counter() - started
    if os.environ.get("MLX_RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    rng, engine = np.random.default_rng(0), model.streaming
    if a.prompt:
        ids = mx.array(rng.integers(0, model.vocabulary_size, (1, a.prompt)))
        first = prompt(model, ids)
        seconds = [prompt(model, ids) for _ in range(a.runs)]
        report(f"prompt of {a.prompt}", lambda s: a.prompt / s, seconds, first_seconds=round(first, 1))
    cache = model.make_cache()
    mx.eval(model(mx.array(rng.integers(0, model.vocabulary_size, (1, 64))), cache=cache, logits_to_keep=1))
    started = time.perf_counter()
    decode(model, cache, rng, WARM_TOKENS)
    first = time.perf_counter() - started
    engine.reset_stats()
    seconds = [decode(model, cache, rng, a.tokens) for _ in range(a.runs)]
    stats = engine.stats()
    report(
        "decode", lambda s: 1 / s, seconds, slots=stats.num_slots, experts=stats.num_experts,
        hit_rate=round(stats.hit_rate, 3), lazy=model.runs_ahead, load_seconds=round(loaded, 1),
        first_tokens_seconds=round(first, 1), peak_gb=round(stats.peak_memory_bytes / 1e9, 2), io=stats.io,
        mb_per_token=round(stats.bytes_read / 1e6 / max(stats.tokens, 1), 1),
    )  # fmt: skip
    print(json.dumps({"checksum of logits": checksum(model)}), flush=True)


if __name__ == "__main__":
    main()

"""Decode on one rank and on two, each with a simulated disk of its own, alternating.

The checkpoint has the dimensions of Qwen3.5-35B-A3B, but few layers and a small vocabulary. Experts are read from the
page cache, at most as fast as the simulated disk: readers of one process wait for each other's bytes. Both ranks run on
this machine and share its memory's speed, which two machines would not. Each process is bound to half of the cores,
also the one of a single rank; ``--free`` binds none, so that one rank has all of them.

    python -m benchmarks.distributed --layers 4 --rate 0.5 --slots 32
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from .ring import rank_environments
from .synthetic import PRESETS, write_checkpoint

WARM_UP, MEASURED = 12, 24


def throttle(bytes_per_second: float) -> None:
    """Let all readers of this process share one disk of that speed."""
    from flash_moe_mlx.storage.store import ExpertStore

    own, lock, free = ExpertStore._read, threading.Lock(), 0.0

    def read(self, piece):
        nonlocal free
        with lock:
            free = max(free, time.perf_counter()) + len(piece.target) / bytes_per_second
            until = free
        got = own(self, piece)
        time.sleep(max(until - time.perf_counter(), 0))
        return got

    ExpertStore._read = read


def measure(directory: str, rate: float, limit: int) -> dict[str, float]:
    import mlx.core as mx

    from flash_moe_mlx import load_model

    throttle(rate)
    model = load_model(directory, memory_limit=limit, io="pread", max_context=256, rank_timeout=60)
    tokens = np.random.default_rng(3).integers(0, model.vocabulary_size, WARM_UP + MEASURED)
    with model.streaming:
        cache = model.make_cache()
        for i, token in enumerate(tokens):
            if i == WARM_UP:
                model.streaming.reset_stats()
                started, cpu = time.perf_counter(), time.process_time()
            mx.eval(model(mx.array([[int(token)]]), cache=cache))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        stats = model.streaming.stats()
    return {
        "ms": 1000 * seconds / MEASURED,
        "cpu_ms": 1000 * cpu / MEASURED,
        "read_ms": 1000 * stats.read_seconds / MEASURED,
        "hit_rate": stats.hit_rate,
        "slots": stats.num_slots,
        "experts": stats.num_experts,
    }


def cores_of(rank: int) -> str:
    """Return the half of the usable cores that a rank is bound to, with commas."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(len(cores) // 2, 1)
    return ",".join(map(str, cores[rank * half :][:half] or cores))


def run(count: int, arguments: list[str], scratch: Path, free: bool) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.distributed", "--child", *arguments]
    bound = [[] if free else ["taskset", "-c", cores_of(rank)] for rank in range(count)]
    processes = [
        subprocess.Popen([*binding, *command], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
        for binding, environment in zip(bound, rank_environments(count, scratch), strict=True)
    ]
    return [json.loads(process.communicate(timeout=600)[0]) for process in processes]


def limit_with(directory: Path, slots: int) -> int:
    """Return the memory limit that leaves room for that many slots per layer on one rank."""
    from flash_moe_mlx import MemoryLimitError, load_model
    from flash_moe_mlx.formats.checkpoint import Checkpoint

    try:
        load_model(directory, memory_limit=1, max_context=256)
    except MemoryLimitError as error:
        least = error.smallest_limit_bytes or 0
    checkpoint = Checkpoint.open(directory)
    k = PRESETS["35b"].num_experts_per_tok
    return least + sum(max(slots - k, 0) * checkpoint.layout(layer).record_bytes for layer in checkpoint.moe_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.5, help="GB/s of each rank's disk")
    parser.add_argument("--slots", type=int, default=32, help="slots per layer on one rank")
    parser.add_argument("--routing", choices=("uniform", "local"), default="uniform")
    parser.add_argument("--free", action="store_true", help="bind no process to cores")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        directory, rate, limit = arguments.child
        print(json.dumps(measure(directory, float(rate), int(limit))), flush=True)
        return
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        dimensions = replace(PRESETS["35b"], num_hidden_layers=arguments.layers, vocab_size=4096)
        write_checkpoint(scratch / "model", dimensions, routing=arguments.routing)
        child = [str(scratch / "model"), str(arguments.rate * 1e9), str(limit_with(scratch / "model", arguments.slots))]
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(arguments.runs):
            for count, measured in times.items():
                ranks = run(count, child, scratch, arguments.free)
                measured.append(statistics.mean(rank["ms"] for rank in ranks))
                print(json.dumps({"ranks": count, "of": ranks}), flush=True)
    one, two = (statistics.median(measured) for measured in times.values())
    print(f"median ms per token: {one:.1f} on one rank, {two:.1f} on two: {one / two:.2f} times the speed")


if __name__ == "__main__":
    main()

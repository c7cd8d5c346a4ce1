"""Decode from packed records against stock ones: cold slots, cold page cache, the same memory limit, sides alternate.

python -m benchmarks.packed_decode STOCK PACKED --memory-limit 1.6GB --io direct
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from flash_moe_mlx import load_model, system


def drop(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        system.drop_pages(fd)
        os.close(fd)


def decode(model: object, tokens: np.ndarray) -> tuple[float, float, int, float]:
    """Return (tokens per second, seconds with reads in progress, bytes read, hit rate)."""
    model.streaming.clear()
    model.streaming.reset_stats()
    cache = model.make_cache()
    begin = time.perf_counter()
    for token in tokens:
        mx.eval(model(mx.array([[int(token)]]), cache=cache))
    seconds = time.perf_counter() - begin
    stats = model.streaming.stats()
    return len(tokens) / seconds, stats.read_seconds, stats.bytes_read, stats.hit_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stock", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--io", default="direct")
    parser.add_argument("--verify", default="sample")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    a = parser.parse_args()
    verify = False if a.verify == "none" else a.verify
    sides = {"stock": (a.stock, "sample"), "packed": (a.packed, verify)}
    models = {
        name: load_model(path, memory_limit=a.memory_limit, max_context=256, io=a.io, verify=check)
        for name, (path, check) in sides.items()
    }
    tokens = np.random.default_rng(0).integers(0, 200_000, a.tokens)
    runs: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in sides}
    for number in range(a.runs + 1):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            drop(sides[name][0])
            result = decode(models[name], tokens)
            if number:  # the first compiles
                runs[name].append(result)
    for name, some in runs.items():
        speeds = [run[0] for run in some]
        print(
            f"{name}: {statistics.median(speeds):.2f} tok/s ({min(speeds):.2f} to {max(speeds):.2f}), reads "
            f"{statistics.median(run[1] for run in some):.2f} s for {some[0][2] / 1e9:.2f} GB "
            f"({some[0][2] / 1e9 / statistics.median(run[1] for run in some):.2f} GB/s), hit rate {some[0][3]:.2f}"
        )
    ratios = [b[0] / a[0] for a, b in zip(runs["stock"], runs["packed"], strict=True)]
    print(f"packed / stock: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), io={a.io}")


if __name__ == "__main__":
    main()

"""Decode and prefill speed of a checkpoint at several memory limits, sides alternating.

    python benchmarks/run.py                          # the embedded model: smallest limit, half, all experts
    python benchmarks/run.py PATH --memory-limit 8GB --memory-limit 16GB --cold

Prints one tab-separated line a run, then the median of each limit. Warm means that the page cache is left as it is;
--cold drops the checkpoint's pages before each run, and the slots are empty at the start of every run either way.
"""

import argparse
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_moe_mlx import MemoryLimitError, load, load_model, stream_generate, system

ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Run:
    """One generation's figures."""

    limit_bytes: int
    prompt_tps: float
    decode_tps: float
    hit_rate: float
    bytes_read: int
    peak_bytes: int
    slots: str

    def row(self) -> str:
        return (
            f"{self.limit_bytes}\t{self.slots}\t{self.hit_rate:.3f}\t{self.bytes_read}\t{self.peak_bytes}\t"
            f"{self.prompt_tps:.1f}\t{self.decode_tps:.1f}"
        )


def drop_pages(model: Path) -> None:
    """Ask the system to forget the checkpoint's pages."""
    for path in model.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        system.drop_pages(descriptor)
        os.close(descriptor)


def limits_of(model: Path, max_context: int) -> list[int]:
    """Return the smallest limit that works, the one at which all experts fit, and their mean."""
    try:
        load_model(model, memory_limit=1, max_context=max_context)
    except MemoryLimitError as error:
        smallest = error.smallest_limit_bytes
    at_least = slot_bytes(model, smallest, max_context)
    most = smallest + slot_bytes(model, "1TB", max_context) - at_least
    return [smallest, (smallest + most) // 2, most]


def slot_bytes(model: Path, limit: int | str, max_context: int) -> int:
    loaded = load_model(model, memory_limit=limit, max_context=max_context)
    with loaded.streaming as streaming:
        return streaming.stats().slot_bytes


def measure(model: Path, limit: int | str, arguments: argparse.Namespace) -> Run:
    if arguments.cold:
        drop_pages(model)
    loaded, tokenizer = load(model, memory_limit=limit, max_context=arguments.max_context)
    mx.reset_peak_memory()
    with loaded.streaming as streaming:
        prompt: list[int] = [7 + i % 500 for i in range(PROMPT_TOKENS)]
        final: Any = None
        # An end token would shorten the run, so none is one.
        tokenizer.eos_token_ids = set()
        for response in stream_generate(loaded, tokenizer, prompt, max_tokens=arguments.max_tokens):
            final = response
        stats = streaming.stats()
    return Run(
        stats.memory_limit_bytes,
        final.prompt_tps,
        final.generation_tps,
        stats.hit_rate,
        stats.bytes_read,
        stats.peak_memory_bytes,
        f"{stats.num_slots}/{stats.num_experts}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=Path(str(files("flash_moe_mlx") / "demo")))
    parser.add_argument("--memory-limit", action="append", help="may be given several times")
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each run")
    arguments = parser.parse_args()

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    state = "cold" if arguments.cold else "warm"
    print(
        f"# commit {commit.stdout.strip() or 'unknown'}, "
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores"
    )
    print(f"# {arguments.model}, {state}, {PROMPT_TOKENS} prompt tokens, {arguments.max_tokens} new")
    print("limit_bytes\tslots\thit_rate\tbytes_read\tpeak_bytes\tprefill_tps\tdecode_tps")
    limits = arguments.memory_limit or limits_of(arguments.model, arguments.max_context)
    measure(arguments.model, limits[-1], arguments)  # compiles what is compiled on first use
    runs: dict[int, list[Run]] = {}
    for _ in range(arguments.runs):
        for limit in limits:
            run = measure(arguments.model, limit, arguments)
            runs.setdefault(run.limit_bytes, []).append(run)
            print(run.row(), flush=True)
    for limit, of_limit in runs.items():
        speeds = [run.decode_tps for run in of_limit]
        print(f"# {limit}: median {statistics.median(speeds):.1f} tok/s, {min(speeds):.1f} to {max(speeds):.1f}")


if __name__ == "__main__":
    main()

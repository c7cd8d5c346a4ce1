"""Mixed requests for a while, with experts evicted all the time: memory, threads and descriptors must stay flat.

    python -m benchmarks.soak --seconds 1200 --every 20 --output soak.tsv --plot soak.svg

One process runs every way of calling, in an order drawn from a seed: `stream_generate` on this thread and on new ones,
asynchronous generations together, generators left half-way, two conversations whose caches are kept and then dropped,
a prefix cache, a batch, a refused peak, a resize, mlx_lm's `generate`, and a second model with other settings. From 45
to 55 % of the time the first model has a larger limit. Then a third model is loaded, asked and closed, many times.
A row of figures is written every few seconds. Linux only.
"""

import argparse
import asyncio
import ctypes
import gc
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx
import mlx_lm

import flash_moe_mlx
from flash_moe_mlx import MemoryLimitError, PrefixCache, stream_generate, stream_generate_async

DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
LIMIT, CONTEXT = 20_400_000, 256  # about half of the demo's experts
COLUMNS = (
    "seconds", "requests", "anonymous_bytes", "threads", "descriptors", "hit_rate", "mlx_active_bytes",
    "mlx_cache_bytes", "heap_bytes", "heap_used_bytes", "mapped_bytes", "objects", "tokens_per_second", "limit_bytes",
    "loads",
)  # fmt: skip
LARGER = 22_400_000
"""The limit in the middle of the run."""
MIDDLE = 0.45, 0.55


class _Mallinfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def heap() -> _Mallinfo:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    return libc.mallinfo2()


class Soak:
    """One model and the requests that are made of it."""

    def __init__(self, seed: int, limit: int = LIMIT):
        self.random = random.Random(seed)
        self.model, self.tokenizer = flash_moe_mlx.load(DEMO, memory_limit=limit, max_context=CONTEXT)
        self.limit = limit
        self.other = flash_moe_mlx.load(DEMO, memory_limit=limit + 2_000_000, max_context=CONTEXT, io="pread")
        self.loads = 0
        self.prefix_cache = PrefixCache(self.model, "400KB")
        self.requests = 0
        self.kept: list[list[Any]] = []
        self.ways: list[Callable[[], None]] = [
            self.here, self.on_a_thread, self.together, self.abandoned, self.conversations, self.with_prefix_cache,
            self.batch, self.refused, self.resized, self.by_mlx_lm, self.on_another_model,
        ]  # fmt: skip

    def prompt(self) -> list[int]:
        return [self.random.randrange(5, 1500) for _ in range(self.random.randrange(3, 120))]

    def run(self, **options: Any) -> None:
        for _ in stream_generate(self.model, self.tokenizer, self.prompt(), self.random.randrange(1, 24), **options):
            pass

    def here(self) -> None:
        self.run()

    def on_a_thread(self) -> None:
        threads = [threading.Thread(target=self.run) for _ in range(self.random.randrange(1, 3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def together(self) -> None:
        async def one() -> None:
            async for _ in stream_generate_async(self.model, self.tokenizer, self.prompt(), 8):
                pass

        async def all_of_them() -> None:
            await asyncio.gather(one(), one())

        asyncio.run(all_of_them())

    def abandoned(self) -> None:
        generation = stream_generate(self.model, self.tokenizer, self.prompt(), 20)
        for _ in itertools.islice(generation, self.random.randrange(1, 5)):
            pass

    def conversations(self) -> None:
        if len(self.kept) == 2:
            self.kept.clear()
        self.kept.append(self.model.make_cache())
        for caches in self.kept:
            for _ in range(self.random.randrange(1, 3)):
                if caches[-1].empty() or max(c.size() for c in caches) < CONTEXT - 150:
                    self.run(prompt_cache=caches)

    def with_prefix_cache(self) -> None:
        self.run(prefix_cache=self.prefix_cache)

    def batch(self) -> None:
        prompts = [self.prompt()[:20] for _ in range(4)]
        mlx_lm.batch_generate(self.model, self.tokenizer, prompts, max_tokens=4)

    def refused(self) -> None:
        try:
            self.model(mx.ones((200, 50), mx.int32))
        except MemoryLimitError:
            self.run()
        else:
            raise AssertionError("a peak beyond the limit was not refused")

    def resized(self) -> None:
        self.model.streaming.resize(self.limit - 300_000)
        self.run()
        self.model.streaming.resize(self.limit)

    def by_mlx_lm(self) -> None:
        mlx_lm.generate(self.model, self.tokenizer, self.prompt(), max_tokens=8)

    def on_another_model(self) -> None:
        pairs = (self.model, self.tokenizer), self.other
        streams = [stream_generate(*pair, self.prompt(), 8) for pair in pairs]
        for _ in itertools.zip_longest(*streams):
            pass

    def in_the_middle(self, share: float) -> None:
        """Set the limit that holds when this share of the run is over."""
        begin, end = MIDDLE
        limit = LARGER if begin <= share < end else LIMIT
        if limit != self.limit:
            self.limit = limit
            self.model.streaming.resize(limit)

    def load_and_close(self) -> None:
        model, tokenizer = flash_moe_mlx.load(DEMO, memory_limit=LIMIT, max_context=CONTEXT)
        with model.streaming:
            for _ in stream_generate(model, tokenizer, self.prompt(), 4):
                pass
        self.loads += 1

    def step(self) -> None:
        self.random.choice(self.ways)()
        self.requests += 1

    def row(self, seconds: float, hit_rate: float, tokens_per_second: float) -> tuple[Any, ...]:
        gc.collect()
        info = heap()
        return (
            round(seconds, 1), self.requests, anonymous_bytes(), len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")), round(hit_rate, 4), mx.get_active_memory(), mx.get_cache_memory(),
            info.arena, info.uordblks, info.hblkhd, len(gc.get_objects()), round(tokens_per_second, 1), self.limit,
            self.loads,
        )  # fmt: skip


class Rows:
    """The rows of one run, written as they come."""

    def __init__(self, soak: Soak, file: TextIO, every: float):
        self._soak, self._file, self._every = soak, file, every
        self._started = time.perf_counter()
        self._written, self._counters = 0.0, soak.model.streaming.counters.copy()
        print(*COLUMNS, sep="\t", file=file, flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def write_if_due(self, *, now: bool = False) -> None:
        passed = self.seconds - self._written
        if passed < self._every and not now:
            return
        since = self._soak.model.streaming.counters.since(self._counters)
        self._counters, self._written = self._soak.model.streaming.counters.copy(), self.seconds
        row = self._soak.row(self.seconds, since.hit_rate, since.tokens / passed)
        print(*row, sep="\t", file=self._file, flush=True)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Draw memory, threads and descriptors, hit rate and speed over time, and memory over the loads at the end."""
    from matplotlib.figure import Figure

    ink, blue, orange = "#7d8590", "#0072B2", "#D55E00"
    run = [row for row in rows if not row["loads"]]
    ends = [row for row in rows if row["loads"]]
    panels: list[tuple[str, list[dict[str, float]], str, dict[str, tuple[str, float]]]] = [
        ("memory, MB", run, "seconds", {"process": ("anonymous_bytes", 1e-6), "arrays": ("mlx_active_bytes", 1e-6)}),
        ("threads, files", run, "seconds", {"threads": ("threads", 1), "descriptors": ("descriptors", 1)}),
        ("hits, %", run, "seconds", {"hits": ("hit_rate", 100)}),
        ("tok/s, prompts included", run, "seconds", {"first model": ("tokens_per_second", 1)}),
        ("memory, MB", ends, "loads", {"process": ("anonymous_bytes", 1e-6), "arrays": ("mlx_active_bytes", 1e-6)}),
    ]
    figure = Figure(figsize=(8, 9), layout="constrained", facecolor="none")
    for axes, (label, some, over, lines) in zip(figure.subplots(len(panels), 1), panels, strict=True):
        for (name, (column, scale)), colour in zip(lines.items(), (blue, orange), strict=False):
            axes.plot([row[over] for row in some], [row[column] * scale for row in some], color=colour, label=name)
        if over == "seconds" and run:
            larger = [row["seconds"] for row in run if row["limit_bytes"] > run[0]["limit_bytes"]]
            if larger:
                axes.axvspan(larger[0], larger[-1], color=ink, alpha=0.15, label="larger limit")
        axes.set_ylim(bottom=0)
        axes.set_facecolor("none")
        axes.set_xlabel(over, color=ink)
        axes.set_ylabel(label, color=ink)
        axes.tick_params(colors=ink)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        axes.legend(frameon=False, labelcolor=ink, fontsize=8, ncols=3)
    figure.savefig(path, transparent=True)


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a file that a run wrote."""
    lines = path.read_text().splitlines()[1:]
    return [dict(zip(COLUMNS, map(float, line.split()), strict=True)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--requests", type=int, default=1 << 62, help="end after so many, if that is earlier")
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loads", type=int, default=100, help="loads and closes after the requests")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the rows of --output into this file")
    options = parser.parse_args()
    if options.plot and not options.output:
        parser.error("--plot needs --output")
    soak = Soak(options.seed)
    with options.output.open("w") if options.output else os.fdopen(os.dup(sys.stdout.fileno()), "w") as file:
        rows = Rows(soak, file, options.every)
        while (share := max(rows.seconds / options.seconds, soak.requests / options.requests)) < 1:
            soak.in_the_middle(share)
            soak.step()
            rows.write_if_due()
        for number in range(options.loads):
            soak.load_and_close()
            rows.write_if_due(now=number % max(options.loads // 20, 1) == 0)
    if options.plot:
        plot(read_rows(options.output), options.plot)


if __name__ == "__main__":
    main()

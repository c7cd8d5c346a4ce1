"""Mixed requests for a while, with experts evicted all the time: memory, threads and descriptors must stay flat.

    python -m benchmarks.soak --seconds 1200 --every 20 --output soak.tsv

One process runs every way of calling, in an order drawn from a seed: `stream_generate` on this thread and on new ones,
asynchronous generations together, generators left half-way, two conversations whose caches are kept and then dropped,
a prefix cache, a batch, a refused peak, a resize, mlx_lm's `generate`. A row of figures is written every few seconds.
Linux only.
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
from typing import Any

import mlx.core as mx
import mlx_lm

import flash_moe_mlx
from flash_moe_mlx import MemoryLimitError, PrefixCache, stream_generate, stream_generate_async

DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
LIMIT, CONTEXT = 20_400_000, 256  # about half of the demo's experts
COLUMNS = (
    "seconds", "requests", "anonymous_bytes", "threads", "descriptors", "hit_rate", "mlx_active_bytes",
    "mlx_cache_bytes", "heap_bytes", "heap_used_bytes", "mapped_bytes", "objects",
)  # fmt: skip


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
        self.prefix_cache = PrefixCache(self.model, "400KB")
        self.requests = 0
        self.kept: list[list[Any]] = []
        self.ways: list[Callable[[], None]] = [
            self.here, self.on_a_thread, self.together, self.abandoned, self.conversations, self.with_prefix_cache,
            self.batch, self.refused, self.resized, self.by_mlx_lm,
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

    def step(self) -> None:
        self.random.choice(self.ways)()
        self.requests += 1

    def row(self, seconds: float, hit_rate: float) -> tuple[Any, ...]:
        gc.collect()
        info = heap()
        return (
            round(seconds, 1), self.requests, anonymous_bytes(), len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")), round(hit_rate, 4), mx.get_active_memory(), mx.get_cache_memory(),
            info.arena, info.uordblks, info.hblkhd, len(gc.get_objects()),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--requests", type=int, default=1 << 62, help="end after so many, if that is earlier")
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    soak = Soak(options.seed)
    with options.output.open("w") if options.output else os.fdopen(os.dup(sys.stdout.fileno()), "w") as file:
        print(*COLUMNS, sep="\t", file=file, flush=True)
        started, written, counters = time.perf_counter(), 0.0, soak.model.streaming.counters.copy()
        while (seconds := time.perf_counter() - started) < options.seconds and soak.requests < options.requests:
            soak.step()
            if seconds - written >= options.every:
                since = soak.model.streaming.counters.since(counters)
                counters, written = soak.model.streaming.counters.copy(), seconds
                print(*soak.row(seconds, since.hit_rate), sep="\t", file=file, flush=True)


if __name__ == "__main__":
    main()

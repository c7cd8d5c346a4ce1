"""Run in a process of its own by tests/runtime/test_process_memory.py, which watches its memory from outside.

    python ways_of_calling_child.py MODEL TOKENIZER LIMIT GENERATIONS

For each way of calling it prints a line before and after so many generations, and waits for one on standard input each
time, so that its parent can look. "-" for MODEL is the control, which loads the tokenizer and no more.
"""

import asyncio
import ctypes
import gc
import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
from mlx_lm.tokenizer_utils import load as load_tokenizer

from flash_moe_mlx import generate, load_model, stream_generate, stream_generate_async

PROMPT = 160
RNG = np.random.default_rng(0)


def prompt() -> list[int]:
    return RNG.integers(1, 1000, PROMPT).tolist()


def ways(model: Any, tokenizer: Any) -> dict[str, Callable[[], object]]:
    def streamed() -> None:
        for _ in stream_generate(model, tokenizer, prompt(), 3):
            pass

    def on_new_threads() -> None:
        threads = [threading.Thread(target=streamed) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def asynchronous() -> None:
        async for _ in stream_generate_async(model, tokenizer, prompt(), 3):
            pass

    def abandoned_on_a_thread() -> None:
        thread = threading.Thread(target=lambda: next(stream_generate(model, tokenizer, prompt(), 9)))
        thread.start()
        thread.join()

    return {
        "generate": lambda: generate(model, tokenizer, prompt(), max_tokens=3),
        "threads": on_new_threads,
        "async": lambda: asyncio.run(asynchronous()),
        "mlx_lm": lambda: mlx_lm.generate(model, tokenizer, prompt(), max_tokens=3),
        "abandoned": lambda: list(itertools.islice(stream_generate(model, tokenizer, prompt(), 9), 2)),
        "abandoned-thread": abandoned_on_a_thread,
    }


def report(text: str) -> None:
    """Print a line with only memory in use held: pages that malloc would give back later count in the peak alone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print(text, flush=True)
    sys.stdin.readline()


def main() -> None:
    path, tokenizer_path, limit, generations = sys.argv[1:]
    tokenizer = load_tokenizer(Path(tokenizer_path))
    tokenizer.eos_token_ids = set()
    if path == "-":
        report("control")
        return
    model = load_model(path, memory_limit=limit, max_context=512)
    calls = ways(model, tokenizer)
    for call in calls.values():  # what is made once: kernels, tapes, streams
        for _ in range(max(5, int(generations) // 5)):
            call()
    for name, call in calls.items():
        report(f"before {name}")
        for _ in range(int(generations)):
            call()
        report(f"after {name}")
    model.streaming.close()


if __name__ == "__main__":
    main()

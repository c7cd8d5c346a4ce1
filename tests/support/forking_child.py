"""Run in a process of its own by tests/test_forks.py: loads the demo, forks, and tells what the child met.

The child has a deadline: MLX's threads are not in it, so that whatever asks MLX for a result waits for ever.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

import flash_moe_mlx

DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
SECONDS = 100  # a first load imports much


def begin(model: Any, tokenizer: Any) -> Any:
    responses = flash_moe_mlx.stream_generate(model, tokenizer, "Hello", max_tokens=3)
    next(responses)
    return responses


async def generate_async(model: Any, tokenizer: Any) -> None:
    async for _ in flash_moe_mlx.stream_generate_async(model, tokenizer, "Hello", max_tokens=2):
        pass


def actions(model: Any, tokenizer: Any) -> dict[str, Callable[[], object]]:
    under_way = begin(model, tokenizer)
    return {
        "forward": lambda: model(mx.array([[1, 2, 3]])),
        "generate": lambda: flash_moe_mlx.generate(model, tokenizer, "Hello", max_tokens=2),
        "async": lambda: asyncio.run(generate_async(model, tokenizer)),
        "continue": lambda: next(under_way),
        "prefix-cache": lambda: flash_moe_mlx.PrefixCache(model, "1MB"),
        "resize": lambda: model.streaming.resize("25MB"),
        "clear": model.streaming.clear,
        "load": load,
        "close": model.streaming.close,
        "exit": lambda: None,
    }


def load() -> object:
    return flash_moe_mlx.load(DEMO, memory_limit="24MB", max_context=128)


def outcome(act: Callable[[], object]) -> int:
    """Act in a forked child; its exit code: 3 if it met an error of ours, -SIGALRM if it hung."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            act()
        except flash_moe_mlx.FlashMoEError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            sys.exit(3)  # with all that the interpreter does at its end
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    print("load-first", outcome(load))
    mx.eval(mx.ones(3) + 1)
    print("load-after-mlx", outcome(load))
    model, tokenizer = flash_moe_mlx.load(DEMO, memory_limit="24MB", max_context=128)
    for name, act in actions(model, tokenizer).items():
        print(name, outcome(act))
    flash_moe_mlx.generate(model, tokenizer, "Hello", max_tokens=2)  # the parent works on
    model.streaming.close()


if __name__ == "__main__":
    main()

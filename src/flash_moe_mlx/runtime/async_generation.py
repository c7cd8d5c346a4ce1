"""stream_generate_async(): stream_generate() for asyncio, on a thread of its own so that the event loop stays free."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx

from ..forks import check_process
from .generation import GenerationResponse, stream_generate


async def stream_generate_async(
    model: Any,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    **kwargs: Any,
) -> AsyncGenerator[GenerationResponse, None]:
    """Generate text without blocking the event loop, one response a token.

    Each generation has a thread of its own, which computes the next token while the caller awaits it and not before.
    Cancelling the task, or closing this generator, ends the forward pass under way before the next layer's reads and
    waits for that: afterwards the model is idle and can be used again. The sampler, logits processors and progress
    callback run on that thread.

    Example:
        >>> async for response in stream_generate_async(model, tokenizer, "Hello"):
        ...     print(response.text, end="", flush=True)

    Args:
        model: From :func:`flash_moe_mlx.load`.
        tokenizer: From :func:`flash_moe_mlx.load`.
        prompt: Text, or token ids.
        max_tokens: Most tokens to generate; -1 goes on to an end token or to max_context.
        **kwargs: Passed to :func:`stream_generate`.

    Yields:
        As :func:`stream_generate`.

    Raises:
        FlashMoEError: As :func:`stream_generate`.
    """
    check_process("generate")
    if isinstance(prompt, mx.array):
        mx.eval(prompt)  # here: the thread below could not
    cancelled = threading.Event()
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1, thread_name_prefix="flash-moe-generate")

    responses: Generator[GenerationResponse, None, None] | None = None

    def step() -> GenerationResponse | None:
        nonlocal responses
        with model.streaming.cancellable(cancelled):
            if responses is None:
                responses = stream_generate(model, tokenizer, prompt, max_tokens, **kwargs)
            return next(responses, None)

    def end() -> None:
        if responses is not None:
            responses.close()
        # MLX can abort the process at its end where a thread is gone whose streams drew random numbers.
        mx.clear_streams()

    try:
        while (response := await loop.run_in_executor(executor, step)) is not None:
            yield response
    finally:
        cancelled.set()
        ended = loop.run_in_executor(executor, end)
        executor.shutdown(wait=False)
        await asyncio.shield(ended)  # a second cancellation leaves the rest to the thread

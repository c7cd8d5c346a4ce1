"""stream_generate_async(): stream_generate() for asyncio, on its own thread so that the event loop stays free."""

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
    """Generate text without blocking the event loop, one response per token.

    Each generation has its own thread, which computes the next token only while the caller awaits it. Cancelling the
    task, or closing this generator, stops the current forward pass before the next layer's reads and waits for it to
    stop: afterwards the model is idle and can be used again. The sampler, the logits processors and the progress
    callback run on that thread.

    Example:
        >>> async for response in stream_generate_async(model, tokenizer, "Hello"):
        ...     print(response.text, end="", flush=True)

    Args:
        model: The model that :func:`flash_moe_mlx.load` returned.
        tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
        prompt: Text, or token ids.
        max_tokens: Maximum number of tokens to generate; -1 continues until an end token or max_context.
        **kwargs: Passed to :func:`stream_generate`.

    Yields:
        The responses of :func:`stream_generate`.

    Raises:
        FlashMoEError: For the reasons listed at :func:`stream_generate`.
    """
    check_process("generate")
    if isinstance(prompt, mx.array):
        mx.eval(prompt)  # evaluated here, because the generation thread could not
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
        # MLX can abort the process at exit if a thread whose streams drew random numbers no longer exists.
        mx.clear_streams()

    try:
        while (response := await loop.run_in_executor(executor, step)) is not None:
            yield response
    finally:
        cancelled.set()
        ended = loop.run_in_executor(executor, end)
        executor.shutdown(wait=False)
        await asyncio.shield(ended)  # on a second cancellation, the thread finishes by itself

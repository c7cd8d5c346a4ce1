"""Delivery: what one request asks of its generation, and the way of its tokens to the client as parts of an answer."""

import time
from collections.abc import Callable
from typing import Any

from ..chat.answer import ThinkingBudget
from ..chat.text import token_table
from ..runtime.generation import GenerationResponse
from .generation import Finished, Generation, Prompt
from .metrics import Metrics
from .parts import AnswerParser, Progress
from .sampling import processors_for, token_logprob


class Delivery:
    """Turns one generation's responses into parts of its answer, and counts them."""

    def __init__(self, tokenizer: Any, generation: Generation, prompt: Prompt, metrics: Metrics):
        """Begin an answer.

        Args:
            tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
            generation: Receives the parts.
            prompt: The prompt.
            metrics: Counters to update.
        """
        self._tokenizer = tokenizer
        self._generation = generation
        self._prompt = prompt
        self._metrics = metrics
        self._parser = AnswerParser(tokenizer, prompt.tokens, generation.request, prompt.ids)
        self._table = token_table(tokenizer)
        self._last: float | None = None

    def options(self, max_context: int) -> dict[str, Any]:
        """Return the arguments of :func:`stream_generate` that the request decides, besides the sampler."""
        request, prompt, tokenizer = self._generation.request, self._prompt, self._tokenizer
        return {
            "max_tokens": -1 if request.max_tokens is None else request.max_tokens,
            "logits_processors": [
                *processors_for(request.sampling, len(prompt.tokens), max_context),
                *_budget(tokenizer, prompt.tokens, request.thinking_budget),
                *([] if prompt.constraint is None else [prompt.constraint]),
            ],
            "prompt_progress_callback": _reporter(self._generation) if request.progress else None,
            "snapshot_at": prompt.snapshot_at,
        }

    def take(self, response: GenerationResponse) -> Finished | None:
        """Pass on a token's parts. Returns the end of the answer with the last one."""
        self._count(response)
        parser, request = self._parser, self._generation.request
        logprob = None
        pieces = parser.read(response.token, response.finish_reason)
        if request.top_logprobs is not None and response.token not in self._tokenizer.eos_token_ids:
            logprob = token_logprob(response, parser.text, self._table, request.top_logprobs)
        for part in parser.feed(pieces, logprob, last=response.finish_reason is not None):
            self._generation.put(part)
        if not (response.finish_reason or parser.stopped):
            return None
        cut = response.finish_reason == "length" and not parser.stopped
        reason = "length" if cut else "tool_calls" if parser.calls else "stop"
        usage = response.prompt_tokens, response.generation_tokens, response.cached_tokens
        return Finished(reason, *usage, stop=parser.stop)

    def _count(self, response: GenerationResponse) -> None:
        now = time.perf_counter()
        if self._last is None:
            self._metrics.first_token(response, self._generation.arrived)
        self._metrics.token(response, 0.0 if self._last is None else now - self._last)
        self._last = now


def _budget(tokenizer: Any, prompt: list[int], tokens: int | None) -> list[ThinkingBudget]:
    return [] if tokens is None else [ThinkingBudget(tokenizer, prompt, tokens)]


def _reporter(generation: Generation) -> Callable[[int, int], None]:
    """Return what passes on how much of the prompt was read; what was read at the first call, the prefix cache had."""
    began, first = time.perf_counter(), [-1]

    def report(processed: int, total: int) -> None:
        if first[0] < 0:
            first[0] = processed
        generation.put(Progress(total, processed, first[0], time.perf_counter() - began))

    return report

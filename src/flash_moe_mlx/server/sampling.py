"""Conversion of a request's sampling parameters to mlx_lm's sampler and logits processors."""

import math
import secrets
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..chat.text import TokenTable
from ..errors import FlashMoEError
from ..runtime.generation import GenerationResponse
from ..runtime.steps import LogitsProcessor, Sampler
from .parts import TokenLogprob
from .schema import Sampling


def sampler_for(sampling: Sampling, vocabulary: int) -> Sampler:
    """Return a sampler. It seeds MLX's generator, which belongs to the thread, when it draws its first token.

    Without a seed in the request it uses a fresh one, so that no earlier request's seed affects this one.
    """
    sample = make_sampler(
        sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k if sampling.top_k < vocabulary else 0,
    )
    seeds = [secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64]

    def seeded(logprobs: mx.array) -> mx.array:
        if seeds:
            mx.random.seed(seeds.pop())
        return sample(logprobs)

    return seeded


def processors_for(sampling: Sampling, prompt_tokens: int, context: int) -> list[LogitsProcessor]:
    """Return penalties and biases. Presence and frequency count the answer; repetition counts the prompt too."""
    ours = make_logits_processors(
        sampling.logit_bias and dict(sampling.logit_bias),
        sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        context,
    )
    in_answer = make_logits_processors(
        presence_penalty=sampling.presence_penalty,
        presence_context_size=context,
        frequency_penalty=sampling.frequency_penalty,
        frequency_context_size=context,
    )
    return ours + [_after(prompt_tokens, processor) for processor in in_answer]


def _after(start: int, processor: LogitsProcessor) -> LogitsProcessor:
    return lambda tokens, logits: processor(tokens[start:], logits)


def token_logprob(response: GenerationResponse, text: str, table: TokenTable, top: int) -> TokenLogprob:
    """Return a token's log-probability and the ``top`` likeliest tokens at its position, likeliest first.

    Args:
        response: The token's response.
        text: Text that the token adds to the answer.
        table: The tokenizer's table of token texts.
        top: Number of alternatives.
    """
    logprobs = np.array(response.logprobs.astype(mx.float32), copy=False)
    if math.isnan(logprobs[response.token]):
        raise FlashMoEError(
            "[logprobs] must be numbers, got NaN: the model's logits are not finite. Verify the checkpoint."
        )
    best: Any = np.argpartition(-logprobs, top - 1)[:top] if top else []
    ordered = sorted(best, key=lambda token: -logprobs[token])
    return TokenLogprob(
        text,
        float(logprobs[response.token]),
        tuple((table.text_of(int(t)), float(logprobs[t]), table.bytes_of(int(t))) for t in ordered),
        table.bytes_of(response.token),
    )

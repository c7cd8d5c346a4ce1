"""A sampler and a logits processor of your own, next to mlx-lm's: each tells another story.

python examples/custom_sampler.py [path/to/checkpoint]
"""

import sys
from importlib.resources import files
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from flash_moe_mlx import chat_prompt, generate, load

TEMPERATURE = 2.5

path = sys.argv[1] if len(sys.argv) > 1 else str(files("flash_moe_mlx") / "demo")


def typical(logprobs: mx.array) -> mx.array:
    """Sample from tokens whose surprise is near what the model expects: neither the obvious nor the odd.

    From log-probabilities (1, vocabulary) to a token (1,). Locally typical sampling, Meister 2022, arXiv:2202.00666,
    after a temperature that makes this small model, which knows its stories by heart, hesitate.
    """
    logprobs = logprobs / TEMPERATURE
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    expected = -mx.sum(mx.exp(logprobs) * logprobs, axis=-1, keepdims=True)
    unusual = mx.abs(-logprobs - expected)
    return mx.random.categorical(mx.where(unusual <= mx.min(unusual) + 2.0, logprobs, -mx.inf))


def without(words: list[str]):
    """Return a logits processor that keeps some words, each of one token after a space, from being said."""
    banned = mx.array([tokenizer.encode(f" {word}", add_special_tokens=False)[-1] for word in words])

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        logits[..., banned] = -mx.inf
        return logits

    return process


model, tokenizer = load(path, memory_limit="14MB", max_context=128)
with model.streaming:
    prompt, _ = chat_prompt(tokenizer, [{"role": "user", "content": "Tell me a story about a small fox."}])
    ways: list[tuple[str, int, dict[str, Any]]] = [
        ("greedy", 0, {}),
        ("mlx-lm's sampler", 1, {"sampler": make_sampler(TEMPERATURE, top_k=4)}),
        ("typical", 4, {"sampler": typical}),
        ("without forest", 0, {"logits_processors": [without(["forest"])]}),
    ]
    for name, seed, options in ways:
        mx.random.seed(seed)
        print(f"{name}: {generate(model, tokenizer, prompt, max_tokens=40, **options)}")

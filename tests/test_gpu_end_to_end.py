"""The whole library on a GPU, against itself on the CPU: run by hand, CI has no GPU.

The first run on CUDA compiles for a minute or two; MLX keeps what it compiled.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import load, stream_generate
from flash_moe_mlx.errors import MemoryLimitError
from flash_moe_mlx.runtime import loading

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

QUESTIONS = ("What is 68 minus 10?", "What is 3 times 2?", "Is 44 bigger than 32?", "Hello!")
FORCED = "44 is bigger than 32. 68 minus 10 is 58. Hello, Luca! 3 times 2 is 6."
MAX_CONTEXT = 512
DEMO = str(files("flash_moe_mlx") / "demo")


@contextmanager
def default_device(device: mx.Device) -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.set_default_device(before)


def own_memory() -> str:
    """Name of the limit that bounds slots: a CUDA GPU has memory of its own."""
    return "gpu_memory_limit" if loading.has_own_memory() else "memory_limit"


def smallest_limit(io: str = "auto") -> int:
    with pytest.raises(MemoryLimitError) as refused:
        load(DEMO, max_context=MAX_CONTEXT, io=io, **{own_memory(): 1})
    assert refused.value.smallest_limit_bytes is not None
    return refused.value.smallest_limit_bytes


def logits(memory_limit: int | str, io: str = "auto") -> np.ndarray:
    """A prompt in one chunk, then tokens one at a time, whatever the model would have said. Shape (tokens, vocab)."""
    model, tokenizer = load(DEMO, max_context=MAX_CONTEXT, io=io, **{own_memory(): memory_limit})
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True)
    cache = model.make_cache()
    parts = [model(mx.array([prompt]), cache=cache)]
    parts += [model(mx.array([[token]]), cache=cache) for token in tokenizer.encode(FORCED)]
    return np.array(mx.concatenate(parts, axis=1)[0].astype(mx.float32))


def answers() -> list[str]:
    model, tokenizer = load(DEMO, max_context=MAX_CONTEXT, **{own_memory(): smallest_limit()})
    prompts = ([{"role": "user", "content": question}] for question in QUESTIONS)
    return [
        "".join(
            part.text
            for part in stream_generate(
                model, tokenizer, tokenizer.apply_chat_template(prompt, add_generation_prompt=True), max_tokens=40
            )
        )
        for prompt in prompts
    ]


def test_logits_and_answers_are_the_cpus_to_bfloat16():
    """Activations are float32 on the CPU and bfloat16 on a GPU: hence 2 per cent."""
    with default_device(mx.cpu):
        expected, expected_answers = logits(smallest_limit()).astype(np.float64), answers()
    result = logits(smallest_limit())
    difference = np.sqrt(((result - expected) ** 2).sum() / (expected**2).sum())
    assert difference < 2e-2
    assert (result.argmax(-1) == expected.argmax(-1)).mean() > 0.95
    assert answers() == expected_answers


def test_bits_depend_on_neither_budget_nor_io():
    first = logits(smallest_limit())
    assert np.array_equal(logits("1GB"), first)
    for io in ("pread", "direct", "mmap"):
        assert np.array_equal(logits(smallest_limit(io), io), first)


def test_memory_stays_within_the_limit():
    model, tokenizer = load(DEMO, max_context=MAX_CONTEXT, **{own_memory(): (limit := smallest_limit())})
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    prompt = tokenizer.encode(" ".join(QUESTIONS * 6))[: MAX_CONTEXT - 80]
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=64):
        pass
    assert mx.get_peak_memory() <= limit
    assert 0 < model.streaming.stats().num_slots < model.streaming.stats().num_experts

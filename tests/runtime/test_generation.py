"""generate() and stream_generate() against mlx_lm's own loop on the same model: tokens, fields, caches, batches."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flash_moe_mlx
from flash_moe_mlx import GenerationResponse, RequestError, generate, stream_generate
from flash_moe_mlx.models.qwen3_5_moe import Model

from ..support.models import VOCABULARY, greedy, make_converted, smallest_limit
from ..support.numerics import RELATIVE_RMS, assert_close

TEXT = "Where do the experts live? On disk."
PROMPT = np.random.default_rng(3).integers(1, VOCABULARY, 23).tolist()
MORE = np.random.default_rng(4).integers(1, VOCABULARY, 9).tolist()
Loaded = tuple[Model, TokenizerWrapper]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A 4-bit model with the fewest slots that work, and its tokenizer."""
    directory = make_converted(tmp_path_factory.mktemp("checkpoint"), bits=4)
    limit = smallest_limit(directory, max_context=256)
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit=limit, max_context=256)
    with model.streaming:
        yield model, tokenizer


def tokens(responses: Iterator[Any]) -> list[int]:
    return [response.token for response in responses]


def ours(loaded: Loaded, prompt: Any = PROMPT, count: int = 12, **how: Any) -> list[int]:
    return tokens(stream_generate(*loaded, prompt, count, **how))


@pytest.mark.parametrize("prompt", [TEXT, PROMPT, mx.array(PROMPT), PROMPT[:1]], ids=["str", "list", "array", "one"])
def test_same_tokens_as_mlx_lm(loaded: Loaded, prompt: Any):
    count = 24
    mine = list(stream_generate(*loaded, prompt, count))
    theirs = list(mlx_lm.stream_generate(*loaded, prompt, count))
    for name in ("token", "text", "prompt_tokens", "generation_tokens", "finish_reason", "from_draft"):
        assert [getattr(r, name) for r in mine] == [getattr(r, name) for r in theirs], name
    for a, b in zip(mine, theirs, strict=True):
        assert_close("log-probabilities", b.logprobs, a.logprobs, RELATIVE_RMS["split"])
    assert len(set(tokens(iter(mine)))) > 4


def test_same_text_as_mlx_lm(loaded: Loaded, capsys: pytest.CaptureFixture[str]):
    text = generate(*loaded, TEXT, max_tokens=20)
    assert text == mlx_lm.generate(*loaded, TEXT, max_tokens=20)
    assert text == generate(*loaded, TEXT, verbose=True, max_tokens=20)
    assert text in capsys.readouterr().out


def test_same_tokens_with_sampler_and_processors(loaded: Loaded):
    def how() -> dict[str, Any]:
        mx.random.seed(11)
        return {
            "sampler": make_sampler(temp=0.9, top_p=0.95, top_k=40),
            "logits_processors": make_logits_processors(repetition_penalty=1.3, repetition_context_size=10),
        }

    mine = ours(loaded, count=24, **how())
    assert mine == tokens(mlx_lm.stream_generate(*loaded, PROMPT, 24, **how()))
    assert mine != ours(loaded, count=24)


def test_processors_see_every_token(loaded: Loaded):
    seen: list[list[int]] = []

    def note(so_far: mx.array, logits: mx.array) -> mx.array:
        assert logits.shape == (1, VOCABULARY)
        seen.append(so_far.tolist())
        return logits

    result = ours(loaded, count=4, logits_processors=[note], prefill_step_size=10)
    assert seen == [PROMPT + result[:n] for n in range(4)]


@pytest.mark.parametrize("size", [1, 7, 22, 4096])
def test_prefill_step_size(loaded: Loaded, size: int):
    progress: list[tuple[int, int]] = []
    result = ours(loaded, prefill_step_size=size, prompt_progress_callback=lambda *now: progress.append(now))
    assert result == ours(loaded)
    assert progress[0] == (0, 23)
    assert progress[-1] == (23, 23)
    assert [done for done, _ in progress[:-1]] == sorted({*range(0, 22, size), 22})


def test_embeddings_in_place_of_tokens(loaded: Loaded):
    model, _ = loaded
    embeddings = model.language_model.model.embed_tokens.embed(mx.array(PROMPT), model.dtype)
    expected = ours(loaded)
    for prompt in ([], PROMPT):
        assert ours(loaded, prompt, input_embeddings=embeddings, prefill_step_size=8) == expected
    assert tokens(mlx_lm.stream_generate(*loaded, PROMPT, 12, input_embeddings=embeddings)) == expected


def test_two_turns_equal_one(loaded: Loaded):
    """The cache holds what was generated, the last token too, as after mlx_lm's loop."""
    model, _ = loaded
    caches = {loop: make_prompt_cache(model) for loop in (stream_generate, mlx_lm.stream_generate)}
    for loop, cache in caches.items():
        answer = tokens(loop(*loaded, PROMPT, 6, prompt_cache=cache))
        assert {c.offset for c in cache if hasattr(c, "keys")} == {len(PROMPT) + 6}
        expected, _ = greedy(model, PROMPT + answer + MORE, 12)
        assert tokens(loop(*loaded, MORE, 12, prompt_cache=cache)) == expected


def test_two_turns_after_a_stop(loaded: Loaded):
    model, tokenizer = loaded
    end = ours(loaded)[5]
    stopping = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[end])
    cache = make_prompt_cache(model)
    answer = tokens(stream_generate(model, stopping, PROMPT, 12, prompt_cache=cache))
    assert answer[-1] == end
    expected, _ = greedy(model, PROMPT + answer + MORE, 6)
    assert ours(loaded, MORE, 6, prompt_cache=cache) == expected


def test_stop_and_length(loaded: Loaded):
    model, tokenizer = loaded
    plain = list(stream_generate(*loaded, PROMPT, 12))
    assert [r.finish_reason for r in plain] == [None] * 11 + ["length"]
    end = plain[5].token
    first = [r.token for r in plain].index(end)
    stopping = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[end])
    stopped = list(stream_generate(model, stopping, PROMPT, 12))
    theirs = list(mlx_lm.stream_generate(model, stopping, PROMPT, 12))
    assert [r.token for r in stopped] == [r.token for r in plain[: first + 1]]
    assert [r.finish_reason for r in stopped] == [None] * first + ["stop"]
    assert "".join(r.text for r in stopped) == "".join(r.text for r in theirs)
    assert stopped[-1].generation_tokens == theirs[-1].generation_tokens


def test_max_tokens(loaded: Loaded):
    assert len(ours(loaded, count=1)) == 1
    assert len(ours(loaded, PROMPT * 11, count=50)) == 256 - 23 * 11 + 1, "ends with max_context"
    unlimited = stream_generate(*loaded, PROMPT, -1)
    assert len([next(unlimited) for _ in range(30)]) == 30
    with pytest.raises(RequestError, match="max_tokens"):
        stream_generate(*loaded, PROMPT, 0)


def test_response_fields(loaded: Loaded):
    model, _ = loaded
    before = model.streaming.counters.copy()
    model.streaming.reset_stats()
    responses = list(stream_generate(*loaded, PROMPT, 5))
    stats, last = model.streaming.stats(), responses[-1]
    assert all(isinstance(r, GenerationResponse) for r in responses)
    assert [r.generation_tokens for r in responses] == [1, 2, 3, 4, 5]
    assert (last.prompt_tokens, last.from_draft) == (23, False)
    assert last.prompt_tps > 0
    assert last.generation_tps > 0
    assert last.peak_memory * 1e9 == pytest.approx(stats.peak_memory_bytes)
    assert last.logprobs.shape == (VOCABULARY,)
    assert float(mx.exp(last.logprobs).sum()) == pytest.approx(1, abs=1e-4)
    assert last.token == int(mx.argmax(last.logprobs))
    for name in ("hits", "misses", "bytes_read", "hit_rate", "read_seconds"):
        assert getattr(last.streaming, name) == pytest.approx(getattr(stats, name)), name
    assert model.streaming.counters.since(before).misses == last.streaming.misses > 0
    assert [r.streaming.bytes_read for r in responses] == sorted(r.streaming.bytes_read for r in responses)
    assert stats.tokens == 23 + 4, "the last token is not fed"


def test_quantised_kv_cache(loaded: Loaded, monkeypatch: pytest.MonkeyPatch):
    how = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 4, "prefill_step_size": 20}
    prompt = PROMPT * 3
    expected = tokens(mlx_lm.stream_generate(*loaded, prompt, 12, **how))
    assert ours(loaded, prompt, **how) == expected
    monkeypatch.setattr("flash_moe_mlx.ops.attention.MAX_SCORE_BYTES", 1)  # attention in blocks of 16 queries
    assert ours(loaded, prompt, **how) == expected


def test_a_quantised_cache_counts_as_context(loaded: Loaded):
    model, _ = loaded
    cache = make_prompt_cache(model)
    ours(loaded, PROMPT * 10, 4, prompt_cache=cache, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    with pytest.raises(RequestError, match="max_context = 256 tokens, got 257"):
        stream_generate(*loaded, PROMPT, 4, prompt_cache=cache)
    with pytest.raises(RequestError, match="max_context"):
        model(mx.array([PROMPT]), cache=cache)


@pytest.mark.parametrize("how", [{}, {"prefill_batch_size": 2, "completion_batch_size": 3, "prefill_step_size": 8}])
def test_batches_equal_single_runs(loaded: Loaded, how: dict[str, int]):
    prompts = [PROMPT, MORE, PROMPT[:1], [*MORE, *PROMPT], PROMPT[3:17]]
    counts = [8, 12, 10, 5, 12]
    batch = mlx_lm.batch_generate(*loaded, prompts, max_tokens=counts, return_token_ids=True, **how)
    singles = [ours(loaded, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert batch.token_ids == singles

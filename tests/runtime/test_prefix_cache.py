"""PrefixCache: what is prefilled again, what is remembered, what it costs, and that answers stay the same."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flash_moe_mlx
from flash_moe_mlx import (
    MemoryLimitError,
    PrefixCache,
    RequestError,
    StoreError,
    chat_prompt,
    load_model,
    stream_generate,
)
from flash_moe_mlx.runtime.prefix_cache import MIN_SNAPSHOT_TOKENS

from ..support.models import VOCABULARY, forget_peak, make_converted, smallest_limit

Loaded = tuple[Any, TokenizerWrapper]
RNG = np.random.default_rng(10)
PROMPT = RNG.integers(1, 257, 60).tolist()
TOKENS = 8

PLAIN = """\
{% for m in messages %}<{{ m.role }}>{{ m.content }}</>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
THINKING = """\
{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}\
{% endif %}{% endfor %}{% if last.user < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}\
{% for m in messages %}<{{ m.role }}>\
{% if m.reasoning_content and loop.index0 > last.user %}<think>{{ m.reasoning_content }}</think>{% endif %}\
{{ m.content }}</>
{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"""

SYSTEM = {"role": "system", "content": "Answer in a word, and truly."}
QUESTION = {"role": "user", "content": "Which is the longest river?"}
ANSWER = {"role": "assistant", "reasoning_content": "Nile or Amazon", "content": "Nile"}
SECOND = {"role": "user", "content": "And the second?"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("checkpoint"), bits=4)


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Iterator[Loaded]:
    """A hybrid model: its recurrent states can't be cut back."""
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit="1GB")
    with model.streaming:
        yield model, tokenizer


@pytest.fixture(scope="module")
def attention_only(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A model of mlx-lm's with KV caches alone, which can be cut back to any token."""
    path = tmp_path_factory.mktemp("qwen3_moe")
    config = {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 64, "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY, "rope_theta": 1e4, "tie_word_embeddings": False, "max_position_embeddings": 4096,
        "norm_topk_prob": True,
    }  # fmt: skip
    mx.random.seed(3)
    mlx_lm.utils.save_model(path, qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config)))
    mlx_lm.utils.save_config(config, path / "config.json")
    model = load_model(path, memory_limit="1GB")
    with model.streaming:
        yield model, loaded[1]


@pytest.fixture
def cache(loaded: Loaded) -> Iterator[PrefixCache]:
    with PrefixCache(loaded[0], "4MB") as cache:
        yield cache


@pytest.fixture(params=[PLAIN, THINKING], ids=["plain", "thinking"])
def chatting(request: pytest.FixtureRequest, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """The same model, its tokenizer with a chat template."""
    monkeypatch.setattr(loaded[1]._tokenizer, "chat_template", request.param)
    return loaded


def run(loaded: Loaded, prompt: list[int], count: int = TOKENS, **options: Any) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt's were spared; checks that exactly the others went through the model."""
    model, _ = loaded
    before = model.streaming.counters.tokens
    responses = list(stream_generate(*loaded, prompt, count, **options))
    assert {r.prompt_tokens for r in responses} == {len(prompt)}
    (cached,) = {r.cached_tokens for r in responses}
    assert model.streaming.counters.tokens - before == len(prompt) - cached + len(responses) - 1
    return [r.token for r in responses], cached


def states(cache: PrefixCache, length: int) -> list[np.ndarray]:
    """Return the states that are remembered of so many tokens."""
    (snapshot,) = [s for s in cache._snapshots if len(s.tokens) == length]
    arrays = []
    for layer in snapshot.caches:
        values = [layer.keys, layer.values] if hasattr(layer, "keys") else layer.cache
        arrays += [np.array(value.astype(mx.float32)) for value in values]
    return arrays


# --- reuse ---


def test_a_prompt_goes_on_from_where_it_was_before(loaded: Loaded, cache: PrefixCache):
    answer, cached = run(loaded, PROMPT, prefix_cache=cache)
    assert cached == 0
    assert run(loaded, PROMPT) == (answer, 0)
    assert run(loaded, PROMPT, prefix_cache=cache) == (answer, len(PROMPT) - 1)
    # The answer is remembered too, but for its last token, which was never fed back.
    longer = PROMPT + answer + PROMPT[:5]
    tokens, cached = run(loaded, longer, prefix_cache=cache)
    assert cached == len(PROMPT) + TOKENS - 1
    assert run(loaded, longer) == (tokens, 0)


@pytest.mark.parametrize(("diverges", "spared"), [(60, 59), (59, 59), (50, 40), (40, 40), (39, 20), (19, 0)])
def test_a_prompt_that_diverges_falls_back(loaded: Loaded, cache: PrefixCache, diverges: int, spared: int):
    run(loaded, PROMPT, prefix_cache=cache, snapshot_at=[20, 40, 59])
    prompt = [*PROMPT[:diverges], *(token % 256 + 1 for token in PROMPT[diverges:]), 7, 7]
    tokens, cached = run(loaded, prompt, prefix_cache=cache)
    assert cached == spared
    assert run(loaded, prompt) == (tokens, 0)


@pytest.mark.parametrize("size", [7, 16, 2048])
def test_warm_is_cold_bit_for_bit(loaded: Loaded, cache: PrefixCache, size: int):
    """Split at the same points, the chunks are the same, and so are all log-probabilities."""
    results = []
    for _ in range(2):
        options = {"prefix_cache": cache, "snapshot_at": [35], "prefill_step_size": size}
        responses = list(stream_generate(*loaded, PROMPT, TOKENS, **options))
        results.append(np.stack([np.array(r.logprobs) for r in responses]))
        del cache._snapshots[1:]  # the end of the answer
    assert responses[0].cached_tokens == 35
    np.testing.assert_array_equal(*results)


def test_what_is_remembered_is_not_changed_by_going_on(loaded: Loaded, cache: PrefixCache):
    run(loaded, PROMPT, prefix_cache=cache, snapshot_at=[30])
    before = states(cache, 30)
    assert len(before) == 4 * 2
    for tail in ([1, 2, 3], [4, 5], list(range(1, 257)) + list(range(1, 100))):  # the last outgrows the KV buffer
        prompt = PROMPT[:30] + tail
        tokens, cached = run(loaded, prompt, prefix_cache=cache, snapshot_at=[])
        assert cached == 30
        assert run(loaded, prompt)[0] == tokens
    for a, b in zip(before, states(cache, 30), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_interrupt_leaves_what_is_remembered(loaded: Loaded, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch):
    answer, _ = run(loaded, PROMPT, prefix_cache=cache, snapshot_at=[30])
    held = len(cache)
    for layer in (0, 2):  # a prompt doesn't ask for the last one's experts
        with monkeypatch.context() as patch:
            reader = loaded[0].streaming.debug_state().reader
            patch.setattr(reader, "record", lambda number, *_, at=layer: stop() if number == at else None)
            with pytest.raises(KeyboardInterrupt):
                run(loaded, PROMPT, prefix_cache=cache, snapshot_at=[30, 45])
        assert len(cache) == held
        assert run(loaded, PROMPT, prefix_cache=cache, snapshot_at=[30]) == (answer, 30)


def stop() -> None:
    raise KeyboardInterrupt


def test_processors_see_the_whole_prompt(loaded: Loaded, cache: PrefixCache):
    seen: list[list[int]] = []

    def note(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    run(loaded, PROMPT, prefix_cache=cache)
    _, cached = run(loaded, PROMPT, 1, prefix_cache=cache, logits_processors=[note])
    assert cached == len(PROMPT) - 1
    assert seen == [PROMPT]


def test_attention_alone_is_cut_back_anywhere(attention_only: Loaded):
    """One copy serves every prompt that shares its beginning, and takes the place of those it begins with."""
    with PrefixCache(attention_only[0], "4MB") as cache:
        answer, _ = run(attention_only, PROMPT, prefix_cache=cache, snapshot_at=[20, 40])
        assert [len(s.tokens) for s in cache._snapshots] == [len(PROMPT) + TOKENS - 1]
        for diverges in (60, 50, 33, 5):
            prompt = [*PROMPT[:diverges], 9, 8, 7]
            tokens, cached = run(attention_only, prompt, prefix_cache=cache, snapshot_at=[])
            assert cached == diverges
            assert run(attention_only, prompt)[0] == tokens
        assert run(attention_only, PROMPT, prefix_cache=cache) == (answer, 59)


# --- conversations ---


def test_the_second_turn_reuses_the_first(chatting: Loaded, cache: PrefixCache):
    _, tokenizer = chatting
    first, points = chat_prompt(tokenizer, [SYSTEM, QUESTION])
    assert run(chatting, first, prefix_cache=cache, snapshot_at=points)[1] == 0
    second, more = chat_prompt(tokenizer, [SYSTEM, QUESTION, ANSWER, SECOND])
    tokens, cached = run(chatting, second, prefix_cache=cache, snapshot_at=more)
    assert (
        cached
        == points[-1]
        == len(tokenizer.encode(f"<system>{SYSTEM['content']}</>\n<user>{QUESTION['content']}</>\n"))
    )
    assert run(chatting, second) == (tokens, 0)
    other, points = chat_prompt(tokenizer, [SYSTEM, SECOND])  # another conversation
    tokens, cached = run(chatting, other, prefix_cache=cache, snapshot_at=points)
    assert cached == points[0]
    assert run(chatting, other) == (tokens, 0)


def test_points_of_a_conversation(chatting: Loaded):
    _, tokenizer = chatting
    thinking = "</think>" in tokenizer._tokenizer.chat_template
    tokens, points = chat_prompt(tokenizer, [SYSTEM, QUESTION, ANSWER, SECOND])
    rendered = [tokenizer.decode(tokens[:point]) for point in points]
    system = f"<system>{SYSTEM['content']}</>\n"
    question = f"{system}<user>{QUESTION['content']}</>\n<assistant>"
    told = f"{question}{ANSWER['content']}</>\n"
    # With thinking, the answer alone renders with its thoughts: the two part where these begin.
    assert rendered == [f"{system}<user>", question if thinking else told, f"{told}<user>{SECOND['content']}</>\n"]
    assert tokenizer.decode(tokens) == rendered[-1] + ("<assistant><think>" if thinking else "<assistant>")


def test_a_template_that_refuses(chatting: Loaded):
    _, tokenizer = chatting
    if "raise_exception" not in tokenizer._tokenizer.chat_template:
        tokens, points = chat_prompt(tokenizer, [SYSTEM])
        assert points == [len(tokens) - len("<assistant>")]
        return
    with pytest.raises(RequestError, match="No user query"):
        chat_prompt(tokenizer, [SYSTEM])
    _, points = chat_prompt(tokenizer, [SYSTEM, QUESTION])  # refuses the system prompt alone: left out
    assert len(points) == 2


def test_few_points_of_a_long_conversation(loaded: Loaded, cache: PrefixCache):
    near = MIN_SNAPSHOT_TOKENS
    assert cache.points([20, 40, 60, 80], 0, 90) == [20, 60, 80]
    assert cache.points([20, 40, 60, 90], 20, 90) == [40, 60]
    assert cache.points([near - 1, 30], 0, 60) == [30]
    assert cache.points([20, 19 + near, 20 + near, 21 + near], 0, 60) == [20, 20 + near]
    # From a copy the same points follow as from scratch: the prefill's chunks, and so the bits, are the same.
    assert cache.points([20, 19 + near, 20 + near, 21 + near], 20, 60) == [20 + near]
    assert cache.points(None, 0, 60) == [59]
    run(loaded, PROMPT, prefix_cache=cache, snapshot_at=[3, 16, 20, 32, 40, 50])
    assert [len(s.tokens) for s in cache._snapshots] == [16, 32, 50, 60 + TOKENS - 1]


# --- bytes ---


def test_the_least_recently_used_go_first(loaded: Loaded):
    model, _ = loaded
    with PrefixCache(model, "4MB") as measure:
        run(loaded, PROMPT, prefix_cache=measure, snapshot_at=[30])
        one = max(s.nbytes for s in measure._snapshots)
    prompts = [[start, *PROMPT[1:31]] for start in (1, 2, 3, 4)]
    with PrefixCache(model, 3 * one) as cache:
        for prompt in prompts[:3]:
            cache.store(prompt, caches_after(model, prompt))
        assert cache.fetch([*prompts[0], 5])[1] == 31  # used: now the second is the oldest
        assert cache.store(prompts[3], caches_after(model, prompts[3]))
        assert [cache.fetch([*prompt, 5])[1] for prompt in prompts] == [31, 0, 31, 31]
        assert cache.nbytes <= cache.max_bytes
        assert not cache.store(PROMPT * 40, caches_after(model, PROMPT * 40))  # larger than all of it
        assert len(cache) == 3
        assert not cache.store(PROMPT[: MIN_SNAPSHOT_TOKENS - 1], caches_after(model, PROMPT[:5]))
        cache.clear()
        assert (len(cache), cache.nbytes) == (0, 0)


def caches_after(model: Any, prompt: list[int]) -> list[Any]:
    caches = model.make_cache()
    mx.eval(model(mx.array([prompt]), cache=caches, logits_to_keep=1), [c.state for c in caches])
    return caches


def test_a_system_prompt_outlives_a_conversation(loaded: Loaded):
    """Its copy is used by every turn, also where a longer one is gone on from."""
    model, _ = loaded
    with PrefixCache(model, "4MB") as measure:
        run(loaded, PROMPT, prefix_cache=measure, snapshot_at=[])
        one = measure.nbytes
    with PrefixCache(model, int(4.2 * one)) as cache:
        prompt = PROMPT
        for _ in range(4):
            answer, _ = run(loaded, prompt, 3, prefix_cache=cache, snapshot_at=[20, len(prompt) - 1])
            prompt = [*prompt, *answer, 3, 4]
        lengths = [len(s.tokens) for s in cache._snapshots]
        assert 20 in lengths
        assert len(lengths) < 9  # as many as were made
        assert lengths[-1] == max(lengths)


def test_bytes_are_those_of_memory(loaded: Loaded):
    """Buffers that grow by 256 tokens, and parts of larger arrays, are not kept as they are."""
    model, _ = loaded
    with PrefixCache(model, "20MB") as cache:
        caches_after(model, PROMPT)
        gc.collect()  # what an earlier test left in a circle
        before = mx.get_active_memory()
        for start in range(1, 21):
            prompt = [start, *PROMPT[1:]]
            assert cache.store(prompt, caches_after(model, prompt))
        gc.collect()
        grown = mx.get_active_memory() - before
        kv = 2 * 60 * 2 * 32 * 4
        assert cache.nbytes < 20 * (kv + 3 * (4 * 32 * 32 + 3 * 256) * 4 + 4 * 60 + 1000)
        assert abs(grown - cache.nbytes) < 0.1 * cache.nbytes


def test_the_memory_limit_counts_them(directory: Path):
    smallest = smallest_limit(directory)
    reserve = 400_000
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit=smallest + reserve)
    with model.streaming as engine:
        slots = engine.stats().num_slots
        expected = run((model, tokenizer), PROMPT)
        with pytest.raises(MemoryLimitError, match="snapshots") as refused:
            PrefixCache(model, reserve + 1)
        assert refused.value.smallest_limit_bytes == smallest + reserve + 1
        assert engine.stats().num_slots == slots
        with PrefixCache(model, reserve) as cache:
            assert engine.stats().num_slots == 4 * 3
            assert run((model, tokenizer), PROMPT, prefix_cache=cache) == expected
            with pytest.raises(MemoryLimitError):
                engine.resize(smallest + reserve - 1)
            with pytest.raises(MemoryLimitError):
                PrefixCache(model, 1)
            engine.resize(smallest + 2 * reserve)
            with PrefixCache(model, reserve):
                assert engine.stats().num_slots == 4 * 3
            engine.resize(smallest + reserve)
            assert len(cache) == 2
        cache.close()
        assert engine.stats().num_slots == slots
        assert run((model, tokenizer), PROMPT) == expected


def test_a_peak_within_the_limit(directory: Path):
    """Copies are made only once what they replace is gone."""
    limit = smallest_limit(directory) + 3_000_000
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit=limit)
    with model.streaming as engine, PrefixCache(model, 2_500_000) as cache:
        forget_peak()
        for start in range(1, 40):
            run((model, tokenizer), [start, *PROMPT[1:]], 2, prefix_cache=cache, snapshot_at=[20, 40])
            assert cache.nbytes <= cache.max_bytes
        assert len(cache) > 20
        assert engine.stats().peak_memory_bytes <= limit


# --- faults ---


def test_what_it_can_not_be_used_with(loaded: Loaded, attention_only: Loaded, cache: PrefixCache):
    with pytest.raises(RequestError, match="another's"):
        run(attention_only, PROMPT, prefix_cache=cache)
    for options in ({"prompt_cache": loaded[0].make_cache()}, {"kv_bits": 8}, {"max_kv_size": 64}):
        with pytest.raises(RequestError, match="without prompt_cache"):
            run(loaded, PROMPT, prefix_cache=cache, **options)
    for size in ("lots", 0, -5):
        with pytest.raises(RequestError):
            PrefixCache(loaded[0], size)


def test_closing(directory: Path):
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit="1GB")
    cache = PrefixCache(model, "2MB")
    run((model, tokenizer), PROMPT, prefix_cache=cache)
    assert len(cache) == 2
    responses = stream_generate(model, tokenizer, PROMPT, 3, prefix_cache=cache, snapshot_at=[30])
    next(responses)
    cache.close()
    cache.close()
    assert len(list(responses)) == 2  # continues without it
    assert len(cache) == 0
    with pytest.raises(StoreError, match="closed"):
        run((model, tokenizer), PROMPT, prefix_cache=cache)
    other = PrefixCache(model, "2MB")
    run((model, tokenizer), PROMPT, prefix_cache=other)
    model.streaming.close()
    assert len(other) == 0
    other.close()
    with pytest.raises(StoreError, match="Load the model again"):
        PrefixCache(model, "2MB")


# --- mlx_lm's own ---


def test_mlx_lm_saves_and_loads_caches(loaded: Loaded, attention_only: Loaded, tmp_path: Path):
    for name, (model, tokenizer) in {"hybrid": loaded, "attention": attention_only}.items():
        file = str(tmp_path / f"{name}.safetensors")
        cache = mlx_lm.models.cache.make_prompt_cache(model)
        answer = [r.token for r in stream_generate(model, tokenizer, PROMPT, TOKENS, prompt_cache=cache)]
        save_prompt_cache(file, cache, {"model": name})
        tail = [5, 6, 7]
        expected = [r.token for r in stream_generate(model, tokenizer, tail, TOKENS, prompt_cache=cache)]
        restored, metadata = load_prompt_cache(file, return_metadata=True)
        assert metadata == {"model": name}
        assert [type(c).__name__ for c in restored] == [type(c).__name__ for c in cache]
        assert [r.token for r in stream_generate(model, tokenizer, tail, TOKENS, prompt_cache=restored)] == expected
        assert run((model, tokenizer), PROMPT + answer + tail)[0] == expected


def test_a_file_of_an_attention_only_model_is_cut_back_to_where_prompts_part(
    attention_only: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flash_moe_mlx.runtime.prefix_files.MIN_FILE_TOKENS", 20)
    model, _ = attention_only
    with PrefixCache(model, "8MB", tmp_path) as first:
        run(attention_only, PROMPT, prefix_cache=first)
    parting = [*PROMPT[:40], *RNG.integers(1, 257, 10).tolist()]
    expected = run(attention_only, parting)[0]
    with PrefixCache(model, "8MB", tmp_path) as second:
        assert run(attention_only, parting, prefix_cache=second) == (expected, 40)
        assert len(list(tmp_path.glob("prefix-*"))) == 1, "what another file holds is not written again"

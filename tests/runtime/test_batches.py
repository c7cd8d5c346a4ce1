"""Several sequences at once: each expert that any of them wants is read once, and every one gets its own tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flash_moe_mlx
from flash_moe_mlx import MemoryLimitError, stream_generate
from flash_moe_mlx.experts.trace import DECODE

from ..support.models import VOCABULARY, chat_config, forget_peak, make_converted, smallest_limit
from ..support.numerics import RELATIVE_RMS, assert_close, floats

Loaded = tuple[Any, TokenizerWrapper]
EXPERTS, K, LAYERS = 32, 4, 4
STEPS = 6
RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(1, VOCABULARY, length).tolist() for length in (9, 1, 17, 30, 4, 12, 2, 23)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = chat_config(num_experts=EXPERTS, num_experts_per_tok=K)
    return make_converted(tmp_path_factory.mktemp("checkpoint"), bits=4, config=config)


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Iterator[Loaded]:
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit="1GB")
    with model.streaming:
        yield model, tokenizer


@pytest.fixture(scope="module")
def singles(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], np.ndarray]]:
    """Of each prompt alone: its tokens, and the experts of each decode step, shape (STEPS, layers, K)."""
    results = []
    for number, prompt in enumerate(PROMPTS):
        path = tmp_path_factory.mktemp("trace") / f"{number}.npz"
        with loaded[0].streaming.trace(path):
            tokens = [r.token for r in stream_generate(*loaded, prompt, STEPS + 1)]
        with np.load(path) as trace:
            # The prompt's last token is a step of one token too: what follows it was decoded.
            results.append((tokens, trace["experts"][trace["phase"] == DECODE][-STEPS:]))
    return results


def merged_caches(model: Any, prompts: list[list[int]]) -> list[Any]:
    """Caches of all the prompts, each prefilled alone, as mlx-lm's batches hold them."""
    each = []
    for prompt in prompts:
        caches = model.make_cache()
        for part in (prompt[:-1], prompt[-1:]):
            if part:
                model(mx.array([part]), cache=caches)
        mx.eval([cache.state for cache in caches])
        each.append(caches)
    return [layer[0].merge(list(layer)) for layer in zip(*each, strict=True)]


def decode(model: Any, singles: list[tuple[list[int], np.ndarray]], size: int, *, cold: bool) -> list[dict[str, int]]:
    """Counters of each decode step of the first ``size`` prompts at once; checks every token."""
    engine = model.streaming
    caches = merged_caches(model, PROMPTS[:size])
    counts = []
    for step in range(STEPS):
        if cold or step == 0:
            engine.clear()
        before = engine.counters.copy()
        inputs = mx.array([[tokens[step]] for tokens, _ in singles[:size]])
        logits = model(inputs, cache=caches)[:, -1]
        assert mx.argmax(logits, axis=-1).tolist() == [tokens[step + 1] for tokens, _ in singles[:size]]
        done = engine.counters.since(before)
        counts.append({"bytes": done.bytes_read, "asked": done.hits + done.misses, "misses": done.misses})
    return counts


def union(singles: list[tuple[list[int], np.ndarray]], size: int, step: int) -> int:
    """Distinct experts that the first ``size`` sequences choose in a step, over all layers, by their single runs."""
    experts = np.stack([chosen[step] for _, chosen in singles[:size]])
    return sum(len(np.unique(experts[:, layer])) for layer in range(LAYERS))


def record_bytes(model: Any) -> int:
    return next(iter(model.streaming.debug_state().demand.layouts.values())).record_bytes


@pytest.mark.parametrize("few_slots", [False, True], ids=["all slots", "K slots"])
def test_a_step_reads_the_union_once(
    directory: Path, loaded: Loaded, singles: list[tuple[list[int], np.ndarray]], few_slots: bool
):
    """Also where the union comes in several groups, because the slots hold but K experts of a layer."""
    model = loaded[0]
    if few_slots:
        model = flash_moe_mlx.load_model(directory, memory_limit=smallest_limit(directory))
        assert model.streaming.stats().num_slots == K * LAYERS
    record, a_token = record_bytes(model), []
    for size in (1, 4, 8):
        counts = decode(model, singles, size, cold=True)
        expected = [union(singles, size, step) for step in range(STEPS)]
        assert [count["bytes"] for count in counts] == [record * experts for experts in expected]
        a_token.append(sum(expected) / size / STEPS)
    assert a_token[0] == K * LAYERS
    assert a_token[0] > 1.1 * a_token[1] > 1.1 * 1.1 * a_token[2]
    if few_slots:
        model.streaming.close()


def test_a_warm_step_reads_what_is_missing(loaded: Loaded, singles: list[tuple[list[int], np.ndarray]]):
    model = loaded[0]
    counts = decode(model, singles, 8, cold=False)
    assert [count["asked"] for count in counts] == [union(singles, 8, step) for step in range(STEPS)]
    assert all(count["bytes"] == count["misses"] * record_bytes(model) for count in counts)
    assert counts[0]["misses"] > counts[-1]["misses"]


@pytest.mark.parametrize("size", [1, 4, 8])
def test_tokens_are_those_of_single_runs(loaded: Loaded, singles: list[tuple[list[int], np.ndarray]], size: int):
    """mlx-lm's continuous batching: prompts padded together, sequences that come later and that leave earlier."""
    generator = BatchGenerator(loaded[0], prefill_batch_size=3, completion_batch_size=8)
    lengths = [STEPS + 1 - number % 3 for number in range(size)]
    received: dict[int, list[int]] = {}
    uids = generator.insert(PROMPTS[: size - size // 4], lengths[: size - size // 4])
    for _ in range(2):
        collect(generator, received)
    uids += generator.insert(PROMPTS[size - size // 4 : size], lengths[size - size // 4 : size])
    while collect(generator, received):
        pass
    generator.close()
    assert [received[uid] for uid in uids] == [
        tokens[:length] for (tokens, _), length in zip(singles, lengths, strict=False)
    ]


def collect(generator: BatchGenerator, received: dict[int, list[int]]) -> int:
    """One step; how many responses it gave."""
    responses = generator.next_generated()
    for response in responses:
        received.setdefault(response.uid, []).append(response.token)
    return len(responses)


def test_padding_reads_nothing(loaded: Loaded, tmp_path: Path):
    """Prompts of 9, 1 and 4 tokens, padded to 9: the experts of 14 tokens are read, not of 27."""
    model = loaded[0]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[4]]
    chosen: list[set[tuple[int, int]]] = []
    for number, prompt in enumerate(prompts):
        with model.streaming.trace(tmp_path / f"{number}.npz"):
            model(mx.array([prompt]), cache=model.make_cache())
        with np.load(tmp_path / f"{number}.npz") as trace:
            chosen.append({(layer, e) for layer in range(LAYERS) for e in trace["experts"][:, layer].ravel().tolist()})
    caches = [type(c).merge([c] * 3) for c in model.make_cache()]
    lengths = [len(prompt) for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=padding)
    padded = mx.array([prompt + [0] * count for prompt, count in zip(prompts, padding, strict=True)])
    model.streaming.clear()
    before = model.streaming.counters.copy()
    with model.streaming.trace(tmp_path / "batch.npz"):
        logits = floats(model(padded, cache=caches))
    done = model.streaming.counters.since(before)
    assert done.bytes_read == len(set.union(*chosen)) * record_bytes(model)
    assert done.tokens == sum(lengths)
    with np.load(tmp_path / "batch.npz") as trace:
        assert len(trace["experts"]) == sum(lengths)
    for row, prompt in enumerate(prompts):
        assert_close("padded", floats(model(mx.array([prompt])))[0], logits[row, : len(prompt)], RELATIVE_RMS["split"])


def test_a_batch_takes_its_memory_from_the_slots(
    directory: Path, loaded: Loaded, singles: list[tuple[list[int], np.ndarray]]
):
    """States and scratch of 8 sequences, under the limit; and a batch that can't be had is refused, not tried."""
    batch = (8, 256, 1024)
    smallest = smallest_limit(directory, max_context=1024)
    with (
        flash_moe_mlx.load_model(directory, memory_limit=smallest, max_context=1024).streaming as engine,
        pytest.raises(MemoryLimitError, match="at least") as refused,
        engine.forward_pass(*batch),
    ):
        pass
    limit = refused.value.smallest_limit_bytes + 300_000
    assert limit > smallest + 1_000_000
    model = flash_moe_mlx.load_model(directory, memory_limit=limit, max_context=1024)
    with model.streaming as engine:
        assert engine.stats().num_slots == EXPERTS * LAYERS
        caches = [type(cache).merge([cache] * 8) for cache in model.make_cache()]
        forget_peak()
        for _ in range(2):
            mx.eval(model(mx.array(RNG.integers(1, VOCABULARY, batch[:2])), cache=caches, logits_to_keep=1))
            with engine.forward_pass(*batch, caches=caches):
                assert K * LAYERS <= engine.stats().num_slots < EXPERTS * LAYERS // 4
        assert engine.stats().peak_memory_bytes <= limit
        with pytest.raises(MemoryLimitError, match="at least"):
            model(mx.zeros((64, 256), mx.int32))
        decode(model, singles, 8, cold=True)

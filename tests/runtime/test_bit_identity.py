"""Logits are the same bits whatever the budget, the cache's state, the io mode and the number of groups."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import MemoryLimitError
from flash_moe_mlx.experts.cache import Fetch
from flash_moe_mlx.models import moe_block as moe
from flash_moe_mlx.models.moe_block import route
from flash_moe_mlx.models.qwen3_5_moe import Model
from flash_moe_mlx.ops.backend import backend
from flash_moe_mlx.runtime import loading

from ..support.models import VOCABULARY, chat_config, make_converted, smallest_limit, streamed
from ..support.numerics import RELATIVE_RMS, assert_close
from ..support.staging import StagingMemory, StagingSlots

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "4-bit-bf16-scales": {"bits": 4, "group_size": 64},
    "unquantised-bf16": {},
}
EXPERTS, K = 16, 3
RNG = np.random.default_rng(5)
PROMPT = mx.array(RNG.integers(0, VOCABULARY, (1, 200)))
BATCH = mx.array(RNG.integers(0, VOCABULARY, (4, 1)))
NEXT = [mx.array(RNG.integers(0, VOCABULARY, (1, 1))) for _ in range(5)]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = chat_config(num_experts=EXPERTS, num_experts_per_tok=K)
    return make_converted(tmp_path_factory.mktemp("checkpoint"), config=config, **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def resident(directory: Path) -> list[np.ndarray]:
    """Results where every expert has its slot."""
    with streamed(directory) as model:
        assert model.streaming.stats().num_slots == EXPERTS * len(model.layers)
        return everything(model)


def bits(logits: mx.array) -> np.ndarray:
    assert logits.dtype == (mx.float32 if backend() == "cpu" else mx.bfloat16)
    result = np.array(logits.astype(mx.float32))
    assert np.isfinite(result).all()
    return result


def everything(model: Model) -> list[np.ndarray]:
    """A prompt of 200 tokens, five tokens after it, one token alone, and a batch of four sequences and then of nine.

    Four tokens go expert by expert for each token, nine are grouped by expert; both need more experts than K.
    """
    cache = model.make_cache()
    results = [bits(model(PROMPT, cache=cache))]
    results += [bits(model(token, cache=cache)) for token in NEXT]
    results += [bits(model(NEXT[0])), bits(model(BATCH)), bits(model(PROMPT[:, :9].T))]
    return results


def assert_same(results: list[np.ndarray], expected: list[np.ndarray]) -> None:
    differing = [i for i, (a, b) in enumerate(zip(results, expected, strict=True)) if not np.array_equal(a, b)]
    assert not differing, f"results {differing} have other bits"


def limit_of_slots(directory: Path, slots: int) -> int:
    """Return a limit with room for this many slots per layer."""
    with streamed(directory) as model:
        record_bytes = next(iter(model.streaming.debug_state().demand.layouts.values())).record_bytes
        return smallest_limit(directory) + (slots - K) * record_bytes * len(model.layers)


def noting(sizes: list[int], acquire: Callable[..., Fetch]) -> Callable[..., Fetch]:
    """`acquire`, with the number of experts of each call put into ``sizes``."""

    def acquire_and_note(layer: int, experts: Sequence[int], **how: bool) -> Fetch:
        sizes.append(len(experts))
        return acquire(layer, experts, **how)

    return acquire_and_note


@pytest.mark.parametrize("slots", [K, EXPERTS // 4, EXPERTS // 2, EXPERTS])
def test_budgets(directory: Path, resident: list[np.ndarray], slots: int):
    with streamed(directory, limit_of_slots(directory, slots)) as model:
        assert model.streaming.stats().num_slots == slots * len(model.layers)
        assert_same(everything(model), resident)
        once = EXPERTS * len(model.layers)
        misses = model.streaming.stats().misses
        assert misses <= once if slots == EXPERTS else misses > once


@pytest.mark.parametrize("io", ["pread", "mmap", "direct"])
def test_io_modes(directory: Path, resident: list[np.ndarray], io: str):
    with streamed(directory, smallest_limit(directory, io=io), io=io) as model:
        assert model.streaming.stats().io == io
        assert_same(everything(model), resident)


@pytest.mark.parametrize("slots", [K, EXPERTS])
def test_records_that_come_by_way_of_staging_buffers(
    directory: Path, resident: list[np.ndarray], slots: int, monkeypatch: pytest.MonkeyPatch
):
    """Another kind of slot memory, which unified memory is one of: nothing is read from a slot too early."""
    limit = limit_of_slots(directory, slots)
    monkeypatch.setattr(loading, "slot_memory", lambda store, plan: StagingMemory(store))
    with streamed(directory, limit) as model:
        assert isinstance(model.streaming.debug_state().cache.bank(0), StagingSlots)
        assert_same(everything(model), resident)
        model.streaming.resize("1GB")
        model.streaming.resize(limit)
        assert_same(everything(model), resident)


def test_cold_and_warm_cache(directory: Path, resident: list[np.ndarray]):
    with streamed(directory) as model:
        for clear in (True, False, True):
            if clear:
                model.streaming.clear()
            model.streaming.reset_stats()
            first = bits(model(PROMPT))
            assert (model.streaming.stats().hits == 0) == clear
            assert (model.streaming.stats().bytes_read > 0) == clear
            assert np.array_equal(first, resident[0])


def test_many_groups_are_taken(directory: Path, resident: list[np.ndarray]):
    """The premise of the tests above: with K slots a prompt takes many groups, with all slots one."""
    counts = []
    for slots in (K, EXPERTS):
        with streamed(directory, limit_of_slots(directory, slots)) as model:
            groups: list[int] = []
            model.streaming.debug_state().cache.acquire = noting(groups, model.streaming.debug_state().cache.acquire)
            assert np.array_equal(bits(model(PROMPT)), resident[0])
            assert np.array_equal(bits(model(BATCH)), resident[-2])
            counts.append(len(groups))
            assert max(groups) <= slots
    layers = 4
    assert counts[1] == 2 * layers
    assert counts[0] > 6 * layers


def test_each_expert_is_read_once_a_pass(directory: Path):
    """However many groups: bytes read are at most the distinct experts' records."""
    with streamed(directory, smallest_limit(directory)) as model:
        model(PROMPT)
        stats = model.streaming.stats()
        assert stats.misses <= EXPERTS * len(model.layers)
        assert stats.bytes_read == stats.misses * stats.slot_bytes // stats.num_slots


def test_resize_in_mid_conversation(directory: Path, resident: list[np.ndarray]):
    smallest, all_slots = limit_of_slots(directory, K), limit_of_slots(directory, EXPERTS)
    with streamed(directory, smallest) as model:
        cache = model.make_cache()
        results = [bits(model(PROMPT, cache=cache))]
        for limit, token in zip((all_slots, smallest, "1GB", smallest, all_slots), NEXT, strict=True):
            model.streaming.resize(limit)
            results.append(bits(model(token, cache=cache)))
        assert_same(results, resident[: len(results)])
        with pytest.raises(MemoryLimitError) as refused:
            model.streaming.resize(smallest - 1)
        assert refused.value.smallest_limit_bytes == smallest
        assert np.array_equal(bits(model(PROMPT)), resident[0])


@pytest.mark.parametrize("k", [2, 5])
def test_another_k(directory: Path, resident: list[np.ndarray], k: int):
    results = []
    for limit in (smallest_limit(directory, num_experts_per_tok=k), "1GB"):
        with streamed(directory, limit, num_experts_per_tok=k) as model:
            stats = model.streaming.stats()
            assert stats.num_slots == len(model.layers) * (EXPERTS if limit == "1GB" else k)
            assert str(k) in stats.lossy[0]
            results.append(everything(model))
    assert_same(*results)
    assert not np.array_equal(results[0][0], resident[0])


def test_another_order_would_be_seen(directory: Path, resident: list[np.ndarray], monkeypatch: pytest.MonkeyPatch):
    """The comparison can fail: experts' outputs summed in another order than the router's have other last bits."""

    def backwards(*arguments: Any) -> tuple[mx.array, mx.array]:
        ids, weights = route(*arguments)
        return ids[:, ::-1], weights[:, ::-1]

    monkeypatch.setattr(moe, "route", backwards)
    with streamed(directory) as model:
        result = bits(model(PROMPT))
    assert not np.array_equal(result, resident[0])
    assert_close("200 tokens", resident[0], result, RELATIVE_RMS["split"])

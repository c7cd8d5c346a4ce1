"""A CUDA GPU's slot memory, on a CUDA runtime of host memory whose copies arrive late."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import ChecksumError, MemoryLimitError, StoreError
from flash_moe_mlx.experts.cache import ExpertCache
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.ops.gpu import cuda_slots
from flash_moe_mlx.ops.gpu.cuda_runtime import BoundRuntime
from flash_moe_mlx.ops.gpu.cuda_slots import CudaMemory, MappedMemory, PinnedMemory
from flash_moe_mlx.packing import pack
from flash_moe_mlx.runtime import loading
from flash_moe_mlx.storage import record_check
from flash_moe_mlx.storage.store import ExpertStore

from ...support.checkpoints import make_checkpoint
from ...support.fake_cuda import POISON, FakeRuntime
from ...support.models import chat_config, make_converted, smallest_limit, streamed
from ...support.stores import InMemoryStore

BUFFERS = 2
EXPERTS = 8

Make = Callable[[ExpertStore, FakeRuntime], CudaMemory]
KINDS: dict[str, Make] = {
    "mapped": MappedMemory,
    "pinned": lambda store, runtime: PinnedMemory(store, runtime, BUFFERS),
}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Make:
    return KINDS[request.param]


@pytest.fixture(scope="module", params=["mlx", "hf-per-expert", "packed"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("checkpoint")
    if request.param == "packed":
        source = make_converted(directory / "source", config=chat_config(num_experts=EXPERTS), bits=4, group_size=64)
        pack(source, directory / "packed")
        return Checkpoint.open(directory / "packed")
    return Checkpoint.open(make_checkpoint(directory, request.param))


@pytest.fixture
def store(checkpoint: Checkpoint) -> Iterator[ExpertStore]:
    with ExpertStore(checkpoint, verify="sample") as store:
        yield store


def cache_of(memory: CudaMemory, slots: int) -> ExpertCache:
    checkpoint = memory.source.checkpoint
    layouts = {layer: checkpoint.layout(layer) for layer in checkpoint.moe_layers}
    return ExpertCache(memory, layouts, dict.fromkeys(layouts, slots))


def record(cache: ExpertCache, layer: int, slot: int) -> bytes:
    return np.array(cache.bank(layer).array[slot]).tobytes()


def expected(checkpoint: Checkpoint, layer: int, expert: int) -> bytes:
    return InMemoryStore(checkpoint)._records[layer, expert]


def assert_whole(cache: ExpertCache, checkpoint: Checkpoint, layer: int, slots: dict[int, int]) -> None:
    for expert, slot in slots.items():
        whole = expected(checkpoint, layer, expert)
        for part in checkpoint.layout(layer).parts:
            run = slice(part.offset, part.offset + part.nbytes)
            assert record(cache, layer, slot)[run] == whole[run], (layer, expert, part.name)


def test_records_are_whole_once_waited_for(make: Make, store: ExpertStore):
    runtime, checkpoint = FakeRuntime(), store.checkpoint
    memory = make(store, runtime)
    count = checkpoint.num_experts(checkpoint.moe_layers[0])
    cache = cache_of(memory, count)
    for layer in checkpoint.moe_layers:
        fetch = cache.acquire(layer, range(count))
        # More records than buffers: they come in turns.
        assert count > BUFFERS
        nbytes = fetch.wait()
        assert nbytes == sum(r.nbytes for expert in range(count) for r in checkpoint.ranges(layer, expert))
        assert_whole(cache, checkpoint, layer, fetch.slots)
    assert runtime.on_device == [(cache.bank(i).address, cache.bank(i).nbytes) for i in checkpoint.moe_layers]
    assert memory.host_bytes > 0
    for _ in range(2):
        memory.close()
    assert (runtime.held, memory.host_bytes) == ((0, 0, 0), 0)


def test_nothing_is_there_before(make: Make, store: ExpertStore):
    """The fake's delay can be seen: a missing wait fails the tests above."""
    memory = make(store, FakeRuntime(delay=0.3))
    cache, layer = cache_of(memory, 2), store.checkpoint.moe_layers[0]
    fetch = cache.acquire(layer, [1])
    assert 1 not in cache.present(layer)
    if isinstance(memory, MappedMemory):
        slot = fetch.slots[1]
        at = cache.bank(layer).slot_address(slot)
        assert ctypes.string_at(at + store.checkpoint.ranges(layer, 1)[0].record_offset, 1)[0] == POISON
    fetch.wait()
    assert_whole(cache, store.checkpoint, layer, fetch.slots)
    memory.close()


def test_a_packed_record_is_one_copy(make: Make, store: ExpertStore):
    runtime = FakeRuntime()
    memory = make(store, runtime)
    cache, layer = cache_of(memory, 4), store.checkpoint.moe_layers[0]
    cache.acquire(layer, [0, 1]).wait()
    runs = len(store.checkpoint.ranges(layer, 0))
    packed_or_pinned = store.checkpoint.format == "packed" or isinstance(memory, PinnedMemory)
    assert runtime.calls["copy"] == 2 * (1 if packed_or_pinned else runs)
    memory.close()


def test_experts_worth_keeping_are_copied_by_a_resize(make: Make, store: ExpertStore):
    memory = make(store, FakeRuntime())
    cache, layer = cache_of(memory, 4), store.checkpoint.moe_layers[0]
    cache.acquire(layer, [0, 1, 2]).wait()
    before = store.bytes_read
    cache.resize({layer: 3}, 1 << 30)
    assert set(cache.present(layer)) == {0, 1, 2}
    assert_whole(cache, store.checkpoint, layer, dict(cache._layers[layer].present))
    assert store.bytes_read == before
    memory.close()


def test_a_fetch_that_nobody_waited_for_writes_into_nobody_elses_slot(make: Make, store: ExpertStore):
    memory = make(store, FakeRuntime(delay=0.02))
    cache, (first, second) = cache_of(memory, 2), store.checkpoint.moe_layers[:2]
    for _ in range(3):
        cache.acquire(first, [0, 1])
        cache.acquire(second, [0, 1])  # the buffers of the one before are taken
        fetch = cache.acquire(first, [2, 3])
        fetch.wait()
        assert_whole(cache, store.checkpoint, first, fetch.slots)
        cache.clear()
    memory.close()


def test_a_copy_that_fails_is_an_error_and_loses_no_slot(make: Make, store: ExpertStore):
    runtime = FakeRuntime()
    memory = make(store, runtime)
    cache, layer = cache_of(memory, 3), store.checkpoint.moe_layers[0]
    runtime.fail_copies = 1
    with pytest.raises(StoreError, match="cudaMemcpyAsync"):
        cache.acquire(layer, [0, 1]).wait()
    assert cache.present(layer) == ()
    fetch = cache.acquire(layer, [0, 1, 2])
    fetch.wait()
    assert_whole(cache, store.checkpoint, layer, fetch.slots)
    memory.close()
    assert runtime.held == (0, 0, 0)


def test_memory_that_cannot_be_pinned_is_a_typed_error_and_all_is_given_back(make: Make, store: ExpertStore):
    runtime = FakeRuntime(pinned_limit=0)
    with pytest.raises(MemoryLimitError, match="memory_limit"):
        make(store, runtime)
    assert runtime.held == (0, 0, 0)


def test_an_allocation_that_the_gpu_refuses_is_a_typed_error(
    make: Make, store: ExpertStore, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    memory = make(store, FakeRuntime())
    monkeypatch.setattr(mx, "zeros", refuse)
    with pytest.raises(MemoryLimitError, match="gpu_memory_limit"):
        cache_of(memory, 2)
    monkeypatch.undo()
    memory.close()


def test_a_damaged_record_is_found(make: Make, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    if checkpoint.format != "packed":
        pytest.skip("stock checkpoints have no checksums")
    monkeypatch.setattr(record_check.zlib, "crc32", lambda _: 0)
    with ExpertStore(checkpoint, verify="full") as store:
        memory = make(store, FakeRuntime())
        cache, layer = cache_of(memory, 2), checkpoint.moe_layers[0]
        for _ in range(2):
            with pytest.raises(ChecksumError):
                cache.acquire(layer, [0]).wait()
        memory.close()


def test_checked_records_are_whole_too(make: Make, checkpoint: Checkpoint):
    if checkpoint.format != "packed":
        pytest.skip("stock checkpoints have no checksums")
    with ExpertStore(checkpoint, verify="full") as store:
        memory = make(store, FakeRuntime())
        cache, layer = cache_of(memory, 4), checkpoint.moe_layers[0]
        for experts in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]):
            fetch = cache.acquire(layer, experts)
            fetch.wait()
            assert_whole(cache, checkpoint, layer, fetch.slots)
        memory.close()


@pytest.mark.parametrize("slots", [3, EXPERTS])
def test_a_model_has_the_same_bits(make: Make, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = make_converted(
        tmp_path, config=chat_config(num_experts=EXPERTS, num_experts_per_tok=3), bits=4, group_size=64
    )
    prompt = mx.array(np.random.default_rng(1).integers(0, 100, (1, 60)))

    def logits(model) -> list[np.ndarray]:
        cache = model.make_cache()
        return [
            np.array(model(tokens, cache=cache).astype(mx.float32))
            for tokens in (prompt, *np.split(prompt[:, :4], 4, axis=1))
        ]

    limit = "1GB" if slots == EXPERTS else smallest_limit(directory)
    with streamed(directory, limit) as model:
        unified = logits(model)
    runtime = FakeRuntime(delay=0.0005)
    monkeypatch.setattr(loading, "slot_memory", lambda store, plan: make(store, runtime))
    with streamed(directory, limit) as model:
        assert model.streaming.stats().num_slots == slots * len(model.layers)
        for own, other in zip(unified, logits(model), strict=True):
            assert np.array_equal(own, other)
    assert runtime.held == (0, 0, 0)
    assert runtime.calls["copy"] > 0


def test_a_prompt_of_more_experts_than_slots_evicts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its other experts pass through slots that layers share, if there is room for two."""
    directory = make_converted(
        tmp_path, config=chat_config(num_experts=EXPERTS, num_experts_per_tok=3), bits=4, group_size=64
    )
    ids = mx.array(np.random.default_rng(1).integers(0, 100, (1, 60)))
    with streamed(directory, "1GB") as model:
        expected = np.array(model(ids).astype(mx.float32))
    monkeypatch.setattr(loading, "slot_memory", lambda store, plan: MappedMemory(store, FakeRuntime(delay=0.002)))
    for passing in (1, 2, 5, 100):
        monkeypatch.setattr(cuda_slots, "passing_records", lambda *_, count=passing: count)
        with streamed(directory, smallest_limit(directory)) as model:
            cache = model.streaming._cache
            for _ in range(2):
                before = [set(cache.present(layer)) for layer in cache.layers]
                assert np.array_equal(np.array(model(ids).astype(mx.float32)), expected)
                after = [set(cache.present(layer)) for layer in cache.layers]
                if passing > 1:
                    assert all(old <= new for old, new in zip(before, after, strict=True))
            assert {len(slots) for slots in after} == {3}
            stats = model.streaming.stats()
            assert stats.hits + stats.misses == 2 * EXPERTS * len(cache.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_records_are_whole_in_a_gpus_own_memory(kind: str, store: ExpertStore):
    """The calls of cuda-bindings, on a real GPU."""
    if not loading.has_own_memory():
        pytest.skip("needs CUDA and cuda-bindings")
    checkpoint = store.checkpoint
    memory = KINDS[kind](store, BoundRuntime())
    cache = cache_of(memory, 4)
    for layer in checkpoint.moe_layers:
        for experts in ([0, 1, 2, 3], [1, 0], [2, 3]):
            fetch = cache.acquire(layer, experts)
            fetch.wait()
            assert_whole(cache, checkpoint, layer, fetch.slots)
    first = checkpoint.moe_layers[0]
    cache.resize({first: 3}, 1 << 30)
    assert_whole(cache, checkpoint, first, dict(cache._layers[first].present))
    memory.close()

"""Two limits where a GPU has memory of its own: here a CUDA runtime of host memory stands in."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import load_model, plan
from flash_moe_mlx.errors import MemoryLimitError, RequestError
from flash_moe_mlx.experts.budget import divide_host
from flash_moe_mlx.ops.gpu import cuda_runtime
from flash_moe_mlx.ops.gpu.cuda_slots import MappedMemory, PinnedMemory
from flash_moe_mlx.ops.gpu.kernel_source import explain_refusals
from flash_moe_mlx.planning.speed import Speed
from flash_moe_mlx.runtime import loading

from ..support.fake_cuda import FakeRuntime
from ..support.models import chat_config, make_converted, smallest_limit, streamed

K, EXPERTS = 3, 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = chat_config(num_experts=EXPERTS, num_experts_per_tok=K)
    return make_converted(tmp_path_factory.mktemp("checkpoint"), config=config, bits=4, group_size=64)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRuntime]:
    runtime = FakeRuntime(delay=0.0)
    monkeypatch.setattr(loading, "has_own_memory", lambda: True)
    monkeypatch.setattr(cuda_runtime, "BoundRuntime", lambda: runtime)
    yield runtime
    assert runtime.held == (0, 0, 0)


def logits(model) -> np.ndarray:
    return np.array(model(mx.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])).astype(mx.float32))


def refusal(directory: Path, **limits: int) -> int:
    with pytest.raises(MemoryLimitError) as refused:
        load_model(directory, **limits)
    assert refused.value.smallest_limit_bytes is not None
    return refused.value.smallest_limit_bytes


def test_each_limit_is_refused_by_name_with_a_value_that_works(directory: Path, runtime: FakeRuntime):
    gpu = refusal(directory, memory_limit=1 << 30, gpu_memory_limit=1)
    with pytest.raises(MemoryLimitError, match=r"\[gpu_memory_limit\].*Use gpu_memory_limit=") as refused:
        load_model(directory, memory_limit=1 << 30, gpu_memory_limit=1)
    assert "memory_limit=" in str(refused.value)
    host = refusal(directory, memory_limit=1, gpu_memory_limit=gpu)
    with pytest.raises(MemoryLimitError, match=r"^\[memory_limit\].*Use memory_limit="):
        load_model(directory, memory_limit=host - 1, gpu_memory_limit=gpu)
    with pytest.raises(MemoryLimitError, match=r"^\[gpu_memory_limit\]"):
        load_model(directory, memory_limit=host, gpu_memory_limit=gpu - 1)
    with streamed(directory, host, gpu_memory_limit=gpu) as model:
        stats = model.streaming.stats()
        assert stats.num_slots == K * len(model.layers)
        assert (stats.memory_limit_bytes, stats.gpu_memory_limit_bytes) == (host, gpu)
        assert 0 < stats.host_bytes <= host
        assert "peak GPU memory" in str(stats)
        assert "host memory" in str(stats)


def test_the_buffers_of_direct_reads_are_in_the_limit_that_a_refusal_names(directory: Path, runtime: FakeRuntime):
    gpu = refusal(directory, memory_limit=1 << 30, gpu_memory_limit=1)
    host = refusal(directory, memory_limit=1, gpu_memory_limit=gpu, io="direct")
    with streamed(directory, host, gpu_memory_limit=gpu, io="direct") as model:
        assert model.streaming.stats().host_bytes <= host


def test_files_are_mapped_where_the_host_has_room_and_else_staged_with_the_same_bits(
    directory: Path, runtime: FakeRuntime
):
    with load_plain(directory) as model:
        expected = logits(model)
    gpu = refusal(directory, memory_limit=1 << 30, gpu_memory_limit=1)
    host = refusal(directory, memory_limit=1, gpu_memory_limit=gpu)
    for limits, kind in (
        ({"memory_limit": 1 << 30}, MappedMemory),
        ({"memory_limit": host}, PinnedMemory),
        ({"memory_limit": 1 << 30, "io": "pread"}, PinnedMemory),
    ):
        limit = limits.pop("memory_limit")
        with streamed(directory, limit, gpu_memory_limit=gpu, **limits) as model:
            assert isinstance(model.streaming.debug_state().memory, kind)
            assert np.array_equal(logits(model), expected)
            assert model.streaming.stats().host_bytes <= limit
            if kind is MappedMemory:
                assert "mapped" in model.streaming.stats().io_reason


def load_plain(directory: Path):
    """The same model with every expert in a slot."""
    return streamed(directory, 1 << 30, gpu_memory_limit=1 << 30)


def test_resize_changes_the_limit_on_the_memory_that_slots_are_in(directory: Path, runtime: FakeRuntime):
    gpu = refusal(directory, memory_limit=1 << 30, gpu_memory_limit=1)
    with load_plain(directory) as model:
        before = logits(model)
        model.streaming.resize(gpu_memory_limit=gpu)
        assert model.streaming.stats().num_slots == K * len(model.layers)
        assert np.array_equal(logits(model), before)
        for wrong in ({"memory_limit": gpu}, {"memory_limit": gpu, "gpu_memory_limit": gpu}, {}):
            with pytest.raises(RequestError, match="only gpu_memory_limit here"):
                model.streaming.resize(**wrong)


def test_plan_shows_both(directory: Path, runtime: FakeRuntime):
    speed = Speed(weight_bytes_per_second=1e9, layer_seconds=1e-3, disk_bytes_per_second=1e9)
    made = plan(directory, memory_limit="300MB", gpu_memory_limit="200MB", speed=speed)
    assert (made.limit_bytes, made.host_limit_bytes) == (200_000_000, 300_000_000)
    assert "GPU memory limit" in str(made)
    assert "host memory limit" in str(made)
    assert made.to_dict()["host_limit_bytes"] == 300_000_000


def test_one_memory_has_one_limit(directory: Path):
    with pytest.raises(RequestError, match=r"^\[gpu_memory_limit\]"):
        load_model(directory, gpu_memory_limit="1GB")
    with streamed(directory, smallest_limit(directory)) as model:
        stats = model.streaming.stats()
        assert (stats.gpu_memory_limit_bytes, stats.host_bytes) == (None, 0)
        with pytest.raises(RequestError, match="only memory_limit here"):
            model.streaming.resize(gpu_memory_limit="1GB")


@pytest.mark.parametrize("limit", ["much", 0, True])
def test_what_is_no_size_is_refused_by_name(directory: Path, limit: object):
    with pytest.raises(RequestError, match=r"^\[gpu_memory_limit\]"):
        load_model(directory, gpu_memory_limit=limit)


def test_a_host_limit_takes_whole_files_or_whole_records():
    how = {"file_bytes": 1000, "record_bytes": 10, "load_bytes": 5, "io_buffer_bytes": 7, "min_records": 3}
    assert divide_host(1005, **how).nbytes == 1000
    staged = divide_host(1004, **how)
    assert (staged.staging_records, staged.nbytes) == (64, 647)
    assert divide_host(42, **how).staging_records == 3
    with pytest.raises(MemoryLimitError) as refused:
        divide_host(41, **how)
    assert refused.value.smallest_limit_bytes == 42


@pytest.mark.parametrize("message", ["cudaMallocAsync failed: out of memory", "[malloc] Unable to allocate 8 bytes."])
def test_a_gpu_without_memory_left_is_a_typed_error(message: str):
    with pytest.raises(MemoryLimitError, match="gpu_memory_limit"), explain_refusals():
        raise RuntimeError(message)

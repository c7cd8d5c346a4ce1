"""Faults while a model generates, and the model's use afterwards; threads, traces and closing."""

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flash_moe_mlx
from flash_moe_mlx import RequestError, ShortReadError, StoreError, stream_generate
from flash_moe_mlx.experts.trace import DECODE, PREFILL

from ..support.faulty_models import OTHER, PROMPT, Loaded, inject, run
from ..support.refusals import held, wait_until_gone


def after(count: int, error: BaseException) -> Callable[[int, int], BaseException | None]:
    """A fault of the read number ``count``, once."""
    calls = iter(range(10**9))
    return lambda layer, expert: error if next(calls) == count else None


@pytest.mark.parametrize("count", [0, 5, 60, 110], ids="read {}".format)
def test_a_read_that_fails(loaded: Loaded, expected: dict[int, list[int]], count: int):
    model, _ = loaded
    inject(model, after(count, StoreError("[disk] is gone. Plug it in.")))
    with pytest.raises(StoreError, match="disk"):
        run(loaded)
    assert run(loaded) == expected[17]
    assert run(loaded, OTHER) == expected[5]


def test_a_file_cut_short_after_load(directory: Path, loaded: Loaded, expected: dict[int, list[int]]):
    shard = directory / "model.safetensors"
    status = shard.stat()
    whole = shard.read_bytes()
    try:
        os.truncate(shard, status.st_size // 10)
        with pytest.raises(ShortReadError, match=r"\[.*\] layer \d+ expert \d+: .*truncated"):
            run(loaded)
    finally:
        shard.write_bytes(whole)  # in place: the same file that is open
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(loaded) == expected[17]


def test_a_generator_closed_early(loaded: Loaded, expected: dict[int, list[int]]):
    stream = stream_generate(*loaded, PROMPT, 10)
    assert [next(stream).token for _ in range(3)] == expected[17][:3]
    stream.close()
    assert run(loaded) == expected[17]
    next(stream_generate(*loaded, PROMPT, 10))  # dropped without close()
    gc.collect()
    assert run(loaded, OTHER) == expected[5]


def test_two_generations_interleaved(loaded: Loaded, expected: dict[int, list[int]]):
    """Two conversations on one model, in one thread, a token each in turn."""
    pairs = list(zip(stream_generate(*loaded, PROMPT, 10), stream_generate(*loaded, OTHER, 10), strict=True))
    assert [a.token for a, _ in pairs] == expected[17]
    assert [b.token for _, b in pairs] == expected[5]


def test_threads_wait_for_each_other(loaded: Loaded, expected: dict[int, list[int]]):
    results: dict[int, list[list[int]]] = {5: [], 17: []}
    errors: list[BaseException] = []

    def work(prompt: list[int]) -> None:
        try:
            for _ in range(3):
                results[len(prompt)].append(run(loaded, prompt))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in (PROMPT, OTHER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert results == {5: [expected[5]] * 3, 17: [expected[17]] * 3}


def test_a_model_used_by_another_thread_than_loaded_it(loaded: Loaded, expected: dict[int, list[int]]):
    results: list[list[int]] = []
    run(loaded)
    thread = threading.Thread(target=lambda: results.append(run(loaded)))
    thread.start()
    thread.join(60)
    assert results == [expected[17]]
    assert run(loaded) == expected[17]


def test_trace_holds_the_routing(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, _ = loaded
    chosen: list[np.ndarray] = []
    reader = model.streaming.debug_state().reader
    inner = reader.record

    def note(layer: int, ids: np.ndarray, weights: Any) -> None:
        chosen.append(ids.copy())
        inner(layer, ids, weights)

    monkeypatch.setattr(reader, "record", note)
    with model.streaming.trace(tmp_path / "routing.npz"):
        run(loaded)
    count = len(chosen)
    run(loaded, OTHER)  # not recorded
    with np.load(tmp_path / "routing.npz") as trace:
        experts, weights, phase = trace["experts"], trace["weights"], trace["phase"]
        assert trace["layers"].tolist() == [0, 1, 2, 3]
        assert trace["num_experts"] == 12
    tokens = len(PROMPT) + 9
    assert experts.shape == weights.shape == (tokens, 4, 3)
    assert phase.tolist() == [PREFILL] * 16 + [DECODE] * 10
    assert experts.max() < 12
    assert all(len(set(ids)) == 3 for ids in experts.reshape(-1, 3).tolist())
    np.testing.assert_allclose(weights.astype(np.float32).sum(-1), 1, atol=2e-3)
    assert (np.diff(weights.astype(np.float32), axis=-1) <= 0).all()
    passes = [np.stack(chosen[i : i + 4], axis=1) for i in range(0, count, 4)]
    np.testing.assert_array_equal(np.concatenate(passes), experts)
    with pytest.raises(RequestError, match="directory"):
        model.streaming.trace(tmp_path / "absent" / "routing.npz")


def test_close(directory: Path, expected: dict[int, list[int]]):
    before = held()
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit="1GB")
    with model.streaming as engine:
        assert engine is model.streaming
        assert run((model, tokenizer)) == expected[17]
        assert any(thread.name.startswith("flash-moe") for thread in threading.enumerate())
    engine.close()
    wait_until_gone(before)
    with pytest.raises(StoreError, match=r"\[.*closed.*Load the model again"):
        run((model, tokenizer))
    for use in (lambda: engine.resize("1GB"), lambda: engine.trace(directory / "routing.npz")):
        with pytest.raises(StoreError, match="closed"):
            use()
    assert engine.stats().num_experts == 48


def test_two_models_in_one_process(directory: Path, loaded: Loaded, expected: dict[int, list[int]]):
    other = flash_moe_mlx.load(directory, memory_limit="1GB", io="mmap")
    with other[0].streaming:
        pairs = zip(stream_generate(*loaded, PROMPT, 10), stream_generate(*other, PROMPT, 10), strict=True)
        assert [(a.token, b.token) for a, b in pairs] == [(token, token) for token in expected[17]]
    assert run(loaded) == expected[17]


def test_a_failed_turn_leaves_the_caller_a_cache_to_drop(loaded: Loaded, expected: dict[int, list[int]]):
    """A cache is half-advanced by a pass that failed; a new one is right again."""
    model, _ = loaded
    cache = make_prompt_cache(model)
    inject(model, after(30, StoreError("[disk] is gone. Plug it in.")))
    with pytest.raises(StoreError):
        list(stream_generate(*loaded, PROMPT, 10, prompt_cache=cache))
    fresh = stream_generate(*loaded, PROMPT, 10, prompt_cache=make_prompt_cache(model))
    assert [response.token for response in fresh] == expected[17]

"""Prefix states in a directory: the same bits after a restart, and what else may lie there or happen to it."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flash_moe_mlx
from flash_moe_mlx import PrefixCache, RequestError, StoreError, load, stream_generate
from flash_moe_mlx.experts.warming import hot_experts, warm
from flash_moe_mlx.runtime import prefix_files
from flash_moe_mlx.runtime.prefix_files import MIN_FILE_TOKENS
from flash_moe_mlx.storage.store import ExpertStore

DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
RNG = np.random.default_rng(7)
PREFIX = RNG.integers(10, 2000, 600).tolist()
QUESTIONS = [RNG.integers(10, 2000, 12).tolist() for _ in range(2)]


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model, tokenizer = load(DEMO, max_context=2048)
    with model.streaming:
        yield model, tokenizer


def ask(loaded: Any, cache: PrefixCache | None, prompt: list[int], at: int | None = len(PREFIX)) -> Any:
    """Tokens and log-probabilities of an answer, and how many tokens of the prompt were not read."""
    how: dict[str, Any] = {} if cache is None else {"prefix_cache": cache, "snapshot_at": None if at is None else [at]}
    answer = list(stream_generate(*loaded, prompt, 6, **how))
    return [(r.token, np.array(r.logprobs).tobytes()) for r in answer], answer[-1].cached_tokens


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("prefix-*.safetensors"))


@pytest.fixture
def filled(model: Any, tmp_path: Path) -> Path:
    with PrefixCache(model[0], "60MB", tmp_path) as cache:
        ask(model, cache, PREFIX + QUESTIONS[0])
    assert len(files(tmp_path)) == 1
    return tmp_path


def test_after_a_restart_a_prefix_is_not_read_and_answers_have_the_same_bits(model: Any, tmp_path: Path):
    with PrefixCache(model[0], "60MB") as cold:
        expected = [ask(model, cold, PREFIX + question)[0] for question in QUESTIONS]
    with PrefixCache(model[0], "60MB", tmp_path / "new" / "directory") as first:
        assert ask(model, first, PREFIX + QUESTIONS[0]) == (expected[0], 0)
    assert (tmp_path / "new" / "directory").stat().st_mode & 0o77 == 0
    for question, answer in zip(QUESTIONS, expected, strict=True):
        with PrefixCache(model[0], "60MB", tmp_path / "new" / "directory") as restarted:
            assert len(restarted) == 0
            assert ask(model, restarted, PREFIX + question) == (answer, len(PREFIX))
            assert ask(model, restarted, PREFIX + question)[0] == answer  # now from memory


def test_what_is_read_from_a_file_decodes_on_the_fast_path(model: Any, filled: Path):
    with PrefixCache(model[0], "60MB", filled) as cache:
        caches, count = cache.fetch(PREFIX + QUESTIONS[0])
    assert count == len(PREFIX)
    assert [type(c) for c in caches] == [type(c) for c in model[0].make_cache()]


def test_only_prompts_that_spare_enough_are_written(model: Any, tmp_path: Path):
    short = PREFIX[: MIN_FILE_TOKENS - 1]
    with PrefixCache(model[0], "60MB", tmp_path) as cache:
        ask(model, cache, [*short, 5], at=len(short))
        assert files(tmp_path) == []
        ask(model, cache, PREFIX + QUESTIONS[0])
        ask(model, cache, PREFIX + QUESTIONS[0] + QUESTIONS[1], at=None)
    assert len(files(tmp_path)) == 1


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[-1000] ^= 1
    elif how == "cut":
        del data[-1000:]
    elif how == "empty":
        data.clear()
    elif how == "header":
        data[:8] = b"\xff" * 8
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "header"])
def test_a_damaged_file_is_ignored_with_a_warning(model: Any, filled: Path, caplog: Any, how: str):
    (path,) = files(filled)
    damage(path, how)
    expected = ask(model, None, PREFIX + QUESTIONS[0])[0]
    with caplog.at_level(logging.WARNING), PrefixCache(model[0], "60MB", filled) as cache:
        answer, cached = ask(model, cache, PREFIX + QUESTIONS[0])
    assert cached == 0 and [token for token, _ in answer] == [token for token, _ in expected]
    assert f"{path.name} is ignored" in caplog.text
    with PrefixCache(model[0], "60MB", filled) as cache:  # it was written anew
        assert ask(model, cache, PREFIX + QUESTIONS[0])[1] == len(PREFIX)


def test_foreign_files_are_ignored_with_a_warning(model: Any, tmp_path: Path, caplog: Any):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "prefix-mine.safetensors").write_bytes(b"mine")
    shutil.copy(DEMO / "model.safetensors", tmp_path / "prefix-model.safetensors")
    with caplog.at_level(logging.WARNING), PrefixCache(model[0], "60MB", tmp_path) as cache:
        ask(model, cache, PREFIX + QUESTIONS[0])
    for name in ("notes.txt", "prefix-mine.safetensors", "prefix-model.safetensors"):
        assert f"{name} is ignored" in caplog.text
        assert (tmp_path / name).exists()


def test_files_of_another_model_are_not_used(model: Any, filled: Path, tmp_path_factory: pytest.TempPathFactory):
    copy = tmp_path_factory.mktemp("other") / "demo"
    shutil.copytree(DEMO, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1  # the same shapes, other weights
    (copy / "model.safetensors").write_bytes(data)
    other = load(copy, max_context=2048)
    with other[0].streaming, PrefixCache(other[0], "60MB", filled) as cache:
        assert ask(other, cache, PREFIX + QUESTIONS[0])[1] == 0
    with PrefixCache(model[0], "60MB", filled) as cache:
        assert ask(model, cache, PREFIX + QUESTIONS[0])[1] == len(PREFIX)


def test_the_least_recently_used_file_goes_first(model: Any, tmp_path: Path):
    prompts = [RNG.integers(10, 2000, 520).tolist() for _ in range(3)]
    with PrefixCache(model[0], "60MB", tmp_path) as cache:
        ask(model, cache, [*prompts[0], 5], at=520)
        size = files(tmp_path)[0].stat().st_size
    limit = int(2.5 * size)
    for i, prompt in enumerate(prompts):
        with PrefixCache(model[0], "60MB", tmp_path, max_directory_bytes=limit) as cache:
            ask(model, cache, [*prompt, 5], at=520)
            if i == 1:  # used again, so that the second is the oldest
                ask(model, cache, [*prompts[0], 6], at=520)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    with PrefixCache(model[0], "60MB", tmp_path) as cache:
        assert [ask(model, cache, [*prompt, 7], at=None)[1] for prompt in prompts] == [520, 0, 520]


def test_a_file_that_went_is_read_anew(model: Any, filled: Path):
    with PrefixCache(model[0], "60MB", filled) as cache:
        files(filled)[0].unlink()
        assert ask(model, cache, PREFIX + QUESTIONS[0])[1] == 0


def test_a_full_disk_is_a_warning(model: Any, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> None:
        Path(args[0]).write_bytes(b"half")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(prefix_files, "save_prompt_cache", full)
    with caplog.at_level(logging.WARNING), PrefixCache(model[0], "60MB", tmp_path) as cache:
        ask(model, cache, PREFIX + QUESTIONS[0])
    assert "was not written: no space left" in caplog.text
    assert not list(tmp_path.glob(".*"))


def test_a_file_in_place_of_the_directory_is_refused(model: Any, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"\[prefix directory\] .* must be a directory"):
        PrefixCache(model[0], "60MB", tmp_path / "file")
    with pytest.raises(RequestError, match="max_directory_bytes"):
        PrefixCache(model[0], "60MB", tmp_path, max_directory_bytes="none")


KILLED = """
    import os, signal, sys
    import mlx_lm.models.cache
    from flash_moe_mlx import PrefixCache, load
    from flash_moe_mlx.runtime import prefix_files
    model, tokenizer = load(sys.argv[1], max_context=2048)
    save, replace = prefix_files.save_prompt_cache, os.replace

    def half(path, *rest):
        save(path, *rest)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    prefix_files.save_prompt_cache = half
    cache = PrefixCache(model, "60MB", sys.argv[2])
    tokens = list(range(10, 610))
    caches = model.make_cache()
    import mlx.core as mx
    model(mx.array([tokens]), cache=caches, logits_to_keep=0)
    cache.store(tokens, caches, lasting=True)
"""


def test_a_process_killed_while_writing_leaves_a_usable_directory(model: Any, filled: Path):
    environment = {**os.environ, "PYTHONPATH": str(DEMO.parent.parent)}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(DEMO), str(filled)], env=environment, timeout=240
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list(filled.glob(".*.safetensors"))) == 1, "it was not killed in the middle"
    with PrefixCache(model[0], "60MB", filled) as cache:
        assert ask(model, cache, PREFIX + QUESTIONS[0])[1] == len(PREFIX)
    assert not list(filled.glob(".*"))


# Experts.


def test_hot_experts_are_read_again_in_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tight = {"memory_limit": "22MB", "max_context": 256}
    first = load(DEMO, **tight)
    with first[0].streaming, PrefixCache(first[0], "1MB", tmp_path) as cache:
        ask(first, cache, PREFIX[:60], at=None)
        hot = hot_experts(first[0].streaming)
    second = load(DEMO, **tight)
    engine = second[0].streaming
    with engine:
        reads: list[tuple[Path, int]] = []
        receive = ExpertStore.submit

        def noted(store: Any, requests: Any) -> Any:
            reads.extend(
                (r.path, r.file_offset) for q in requests for r in store.checkpoint.ranges(q.layer, q.expert)[:1]
            )
            return receive(store, requests)

        monkeypatch.setattr(ExpertStore, "submit", noted)
        with PrefixCache(second[0], "1MB", tmp_path):
            assert {layer: set(experts) for layer, experts in hot_experts(engine).items()} == {
                layer: set(experts) for layer, experts in hot.items()
            }
        assert reads and reads == sorted(reads)
        assert engine.stats().misses == 0


def test_experts_that_do_not_exist_or_do_not_fit_are_left_out(model: Any, tmp_path: Path):
    loaded = load(DEMO, memory_limit="22MB", max_context=256)
    engine = loaded[0].streaming
    with engine:
        everything = {layer: [*range(-3, 40), 0, 1] for layer in range(-1, 12)}
        count = warm(engine, everything)
        assert 0 < count == sum(map(len, hot_experts(engine).values())) == engine.stats().num_slots
        assert warm(engine, everything) == 0
        ask(loaded, None, PREFIX[:30])
    with pytest.raises(StoreError):
        warm(engine, {0: [1]})


@pytest.mark.parametrize("text", ["{", "3", '{"a": [1]}', '{"0": ["a"]}', '{"0": 3}', "\xff"])
def test_a_damaged_list_of_experts_is_ignored_with_a_warning(model: Any, filled: Path, caplog: Any, text: str):
    (path,) = filled.glob("experts-*.json")
    path.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING), PrefixCache(model[0], "60MB", filled):
        pass
    assert f"{path.name} is ignored" in caplog.text
    json.loads(path.read_text())  # written anew

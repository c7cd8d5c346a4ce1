"""Inside an application: threads, asyncio, interrupts, several models, the hub's cache, logs, closing."""

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flash_moe_mlx
from flash_moe_mlx import RequestError, StoreError, generate, stream_generate, stream_generate_async
from flash_moe_mlx.models.qwen3_5_moe import Model

from ..support.faulty_models import replace_store
from ..support.models import VOCABULARY, chat_config, make_converted, smallest_limit, with_fewest_slots

CHILD = Path(__file__).parents[1] / "support" / "embedding_child.py"
PROMPT = np.random.default_rng(8).integers(1, VOCABULARY, 20).tolist()
TOKENS = 10
INTERRUPTS = 80
READ_SECONDS = 0.3
LAYERS = 4
Loaded = tuple[Model, TokenizerWrapper]

pytestmark = pytest.mark.xdist_group("embedding")  # they share one run of the child


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("checkpoint"), bits=4)


@pytest.fixture(scope="module")
def other_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of other sizes and with rotary frequencies that are computed, not given."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    rope = {"partial_rotary_factor": 0.25, "rope_theta": 10000.0, **yarn}
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 8, "max_position_embeddings": 1024}
    config = chat_config(**sizes, rope_parameters=rope)
    return make_converted(tmp_path_factory.mktemp("other"), config=config, seed=1)


@pytest.fixture
def loaded(directory: Path) -> Iterator[Loaded]:
    with with_fewest_slots(directory) as pair:
        yield pair


@pytest.fixture(scope="module")
def child(directory: Path, other_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the report of a fresh process that loads both models from a hub cache, one as a revision of the other."""
    home = tmp_path_factory.mktemp("huggingface")
    repository = home / "hub" / "models--somebody--tiny-moe"
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(parents=True)
    for source, commit, name in ((directory, "a" * 40, "main"), (other_directory, "b" * 40, "v2")):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs" / name).write_text(commit)
        for path in source.iterdir():
            blob = repository / "blobs" / f"{commit[:8]}-{path.name}"
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    command = [sys.executable, "-W", "error", str(CHILD), "somebody/tiny-moe", "v2", "v3", *map(str, PROMPT)]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in environment.items() if k not in ("HF_HUB_CACHE", "PYTHONWARNINGS")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


@pytest.fixture(scope="module")
def expected(child: dict[str, Any]) -> list[int]:
    """Tokens of a fresh process."""
    return child["tokens"]["main"]


def run(loaded: Loaded, **options: Any) -> list[int]:
    return [response.token for response in stream_generate(*loaded, PROMPT, TOKENS, **options)]


def delay_reads(loaded: Loaded) -> None:
    """Each layer's reads take READ_SECONDS."""
    replace_store(loaded[0].streaming, delay=READ_SECONDS)


POOLS = ("flash-moe-io", "faulty-store")
"""Their threads start when they are first needed, and live as long as the engine."""


def held(*but: str) -> tuple[set[str], set[str]]:
    """Threads whose name doesn't begin so, and what files are open (Linux): to be the same before and after.

    The CPU kernels' threads serve the whole process, for good.
    """
    gc.collect()
    files = set()
    for number in os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else ():
        with contextlib.suppress(OSError):  # the listing's own
            files.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return {t.name for t in threading.enumerate() if not t.name.startswith(("flash-moe-kernels", *but))}, files


def in_thread(function: Any) -> Any:
    """Call a function on a new thread, wait for the thread to end, and return the result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(60)
    assert len(results) == 1, "it raised"
    return results[0]


# --- processes and the hub ---


def test_offline_from_the_hubs_cache_without_a_warning(child: dict[str, Any], loaded: Loaded, other_directory: Path):
    """`-W error` in the child turns any warning into a traceback, or into text on stderr where none can be raised."""
    assert child["stderr"] == ""
    assert child["tokens"]["main"] == run(loaded)
    model, tokenizer, config = flash_moe_mlx.load(other_directory, memory_limit="1GB", return_config=True)
    with model.streaming:
        assert child["tokens"]["revision"] == run((model, tokenizer)) != child["tokens"]["main"]
    assert config["model_type"] == child["model_type"]
    assert "somebody/tiny-moe" in child["refused"]


# --- threads ---


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain MLX"])
def test_every_token_on_another_thread(
    loaded: Loaded, expected: list[int], plain: bool, monkeypatch: pytest.MonkeyPatch
):
    """As asyncio.to_thread does. MLX evaluates a lazy array only on the thread that made it."""
    if plain:  # its states stay lazy where nobody evaluates them
        module = sys.modules["flash_moe_mlx.ops.gated_delta"]  # the package has a function of this name
        monkeypatch.setattr(module, "use_cpu_kernels", lambda: False)
    cache = loaded[0].make_cache()

    def first_part() -> None:
        loaded[0](mx.array([PROMPT[:12]]), cache=cache)
        mx.eval([c.state for c in cache])

    in_thread(first_part)
    responses = stream_generate(*loaded, PROMPT[12:], TOKENS, prompt_cache=cache)
    tokens = []
    while (response := in_thread(lambda: next(responses, None))) is not None:
        tokens.append(response.token)
        assert int(response.logprobs.argmax()) == response.token  # usable here too
    assert tokens == expected


def test_processors_and_embeddings_on_another_thread(loaded: Loaded, expected: list[int]):
    model, _ = loaded
    seen: list[int] = []

    def note(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(int(tokens.sum().item()))
        return logits

    embeddings = model.text_model.embed_tokens.embed(mx.array([PROMPT]), model.dtype)[0]
    responses = stream_generate(
        *loaded, mx.array(PROMPT) + 0, TOKENS, logits_processors=[note], input_embeddings=embeddings + 0
    )
    tokens = []
    while (response := in_thread(lambda: next(responses, None))) is not None:
        tokens.append(response.token)
    assert tokens == expected
    assert seen == [sum(PROMPT) + sum(tokens[:count]) for count in range(TOKENS)]


def test_two_models_of_different_sizes_at_once(directory: Path, other_directory: Path, child: dict[str, Any]):
    limit_before = mx.set_cache_limit(77 << 20)
    try:
        models = [flash_moe_mlx.load(path, memory_limit="1GB") for path in (directory, other_directory)]
        results: dict[int, list[int]] = {}
        threads = [
            threading.Thread(target=lambda i=i, pair=pair: results.__setitem__(i, run(pair)))
            for i, pair in enumerate(models)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == {0: child["tokens"]["main"], 1: child["tokens"]["revision"]}
        limits = []
        for model, _ in models:
            limits.append(cache_limit())
            model.streaming.close()
        assert max(limits) <= sum(model.streaming.debug_state().budget.buffer_bytes for model, _ in models)
        assert cache_limit() == 77 << 20  # the application's own choice is back
    finally:
        mx.set_cache_limit(limit_before)


def cache_limit() -> int:
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def test_states_of_several_generations_are_counted(directory: Path, expected: list[int]):
    """Two long conversations at once need twice the KV cache, which comes out of the slots; a third is refused."""
    context = 4096
    state = 2_100_000  # of one: KV cache of 4,096 tokens, and recurrent states
    limit = smallest_limit(directory, max_context=context) + int(1.2 * state)
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit=limit, max_context=context)
    with model.streaming as engine:
        assert 0.8 * state < engine.debug_state().budget.state_bytes < 1.2 * state
        slots, kept = [], []
        for _ in range(2):
            kept.append(model.make_cache())
            with engine.forward_pass(1, 2048, context, caches=kept[-1]):
                slots.append(engine.stats().num_slots)
        assert slots[0] > slots[1] >= LAYERS * 3
        assert run((model, tokenizer)) == expected  # short: there is room for its state
        third = model.make_cache()
        with (
            pytest.raises(flash_moe_mlx.MemoryLimitError, match="other sequences"),
            engine.forward_pass(1, 2048, context, caches=third),
        ):
            pass
        del kept
        with engine.forward_pass(1, 2048, context, caches=third):
            pass


def test_conversations_count_while_their_caches_live(loaded: Loaded):
    engine, state = loaded[0].streaming, loaded[0].streaming.debug_state().demand.footprint.state_bytes
    gc.collect()
    assert engine.debug_state().reserved_state_bytes == 0
    first, second = (stream_generate(*loaded, prompt, 5) for prompt in (PROMPT, PROMPT[:7]))
    next(first), next(second), next(second)
    assert engine.debug_state().reserved_state_bytes == state(1, 20) + state(1, 8)
    second.close()
    del second
    assert engine.debug_state().reserved_state_bytes == state(1, 20)
    assert len(list(first)) == 4
    assert engine.debug_state().reserved_state_bytes == 0


# --- asyncio ---


async def collect(loaded: Loaded, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    return [r.token async for r in stream_generate_async(*loaded, prompt, TOKENS, **options)]


def test_async_tokens(loaded: Loaded, expected: list[int]):
    async def together() -> list[list[int]]:
        return await asyncio.gather(collect(loaded), collect(loaded), collect(loaded, mx.array(PROMPT) + 0))

    before = held(*POOLS)
    assert asyncio.run(together()) == [expected] * 3
    assert settled() == before


def settled() -> tuple[set[str], set[str]]:
    """Return `held` once idle threads are gone."""
    deadline = time.monotonic() + 5
    while any(t.name.startswith("flash-moe-generate") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held(*POOLS)


async def longest_gap(work: Any) -> float:
    """Seconds that the event loop was longest kept from a task that wants to run every 10 ms."""
    longest, last = 0.0, time.perf_counter()
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.sleep(0.01)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await task
    return longest


@pytest.mark.serial
def test_the_event_loop_stays_free(loaded: Loaded):
    """A token takes 0.6 s of reading here. The synchronous iterator shows that the measure sees it."""

    async def blocking() -> None:
        next(stream_generate(*loaded, PROMPT[:1], 1))

    async def free() -> None:
        assert len([r async for r in stream_generate_async(*loaded, PROMPT[:1], 2)]) == 2

    delay_reads(loaded)
    token_seconds = LAYERS * READ_SECONDS
    assert asyncio.run(longest_gap(blocking())) >= token_seconds
    assert asyncio.run(longest_gap(free())) < token_seconds / 2


@pytest.mark.parametrize("how", ["cancel", "timeout", "aclose", "break"])
def test_async_generation_ends_early(loaded: Loaded, expected: list[int], how: str):
    """In the middle of a token: the forward pass ends before the next layer's reads, and the model is usable."""
    received: list[int] = []
    delay_reads(loaded)
    passes = loaded[0].streaming.counters.tokens

    async def consume() -> None:
        async with contextlib.aclosing(stream_generate_async(*loaded, PROMPT[:1], 100)) as responses:
            async for response in responses:
                received.append(response.token)
                if how == "break" or (how == "aclose" and len(received) == 2):
                    break

    async def main() -> float:
        task = asyncio.ensure_future(consume())
        if how == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(LAYERS * READ_SECONDS * 1.5):
                    await task
            return 0.0
        if how != "cancel":
            await task
            return 0.0
        while loaded[0].streaming.counters.tokens == passes:
            await asyncio.sleep(READ_SECONDS / 10)
        await asyncio.sleep(READ_SECONDS / 2)  # the first layer of the second token
        task.cancel()
        started = time.perf_counter()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.perf_counter() - started

    before = held(*POOLS)
    waited = asyncio.run(main())
    assert waited < LAYERS * READ_SECONDS / 2, "cancelling waited for more than the layer under way"
    assert settled() == before
    assert len(received) <= 3
    done = loaded[0].streaming.counters.tokens - passes
    loaded[0].streaming.debug_state().memory.source.delay = 0.0
    assert loaded[0].streaming.counters.tokens - passes == done  # nothing continues in the background
    assert not loaded[0].streaming.lock._is_owned()
    assert asyncio.run(collect(loaded)) == expected


def test_async_errors_reach_the_caller(loaded: Loaded):
    with pytest.raises(RequestError, match="prompt"):
        asyncio.run(collect(loaded, []))
    loaded[0].streaming.close()
    with pytest.raises(StoreError, match="Load the model again"):
        asyncio.run(collect(loaded))


# --- interrupts ---


def interrupted_by_signal(loaded: Loaded, seconds: float) -> bool:
    """Generate with a KeyboardInterrupt after so many seconds, as Ctrl-C raises it; False if it was too late."""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        run(loaded)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


def interrupted_in_thread(loaded: Loaded, seconds: float) -> bool:
    """The same on a worker thread, as a notebook's or a debugger's kernel does it."""
    outcome: list[bool] = []

    def work() -> None:
        try:
            run(loaded)
            outcome.append(False)
        except KeyboardInterrupt:
            outcome.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(seconds)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    thread.join(60)
    assert not thread.is_alive()
    return outcome == [True]


@pytest.mark.slow
@pytest.mark.timeout(300, method="thread")  # the other method has the same signal
@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # one that came after the work
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that hit a callback of gc
def test_interrupted_at_random_moments(loaded: Loaded, expected: list[int]):
    """No thread, descriptor or slot is lost, and the next answer is a fresh process's."""
    generator = random.Random(9)
    engine = loaded[0].streaming
    assert run(loaded) == expected
    started = time.perf_counter()
    assert run(loaded) == expected
    seconds = time.perf_counter() - started
    before = held(*POOLS)
    memory = []
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        hits = 0
        for attempt in range(INTERRUPTS):
            interrupt = interrupted_in_thread if attempt % 4 == 3 else interrupted_by_signal
            hits += interrupt(loaded, max(generator.random() * seconds, 1e-4))
            if attempt % 20 == 19:
                assert run(loaded) == expected
                gc.collect()
                memory.append(mx.get_active_memory())
    finally:
        signal.signal(signal.SIGALRM, old)
    assert hits > INTERRUPTS // 5  # fewer than half where the machine was slower while the run was timed
    assert held(*POOLS) == before
    assert (
        sum(t.name.startswith("flash-moe-io") for t in threading.enumerate()) <= engine.debug_state().store.num_threads
    )
    assert not engine.debug_state().store._under_way
    assert engine.debug_state().reserved_state_bytes == 0
    assert max(memory) - min(memory) < 1 << 20
    assert in_thread(lambda: engine.lock.acquire(timeout=1) and (engine.lock.release() or True))
    assert run(loaded) == expected
    for layer in engine.debug_state().layers.values():
        used = [*layer.present.values(), *layer.free]
        assert sorted(used) == list(range(layer.bank.num_slots))
        assert not layer.filling


# --- closing, and what is said ---


def test_close_gives_memory_back(directory: Path):
    gc.collect()
    mx.clear_cache()
    before, active = held(), mx.get_active_memory()
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit="1GB")
    stats = model.streaming.stats()
    assert generate(model, tokenizer, PROMPT, max_tokens=3)
    assert mx.get_active_memory() - active >= stats.slot_bytes + stats.dense_bytes
    model.streaming.close()
    assert mx.get_active_memory() - active <= stats.dense_bytes + 4096
    assert held() == before
    with pytest.raises(StoreError, match="Load the model again"):
        generate(model, tokenizer, PROMPT)
    del model
    gc.collect()
    assert mx.get_active_memory() - active <= 4096


def test_a_dropped_model_leaves_nothing(directory: Path):
    gc.collect()
    before, active = held(), mx.get_active_memory()
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit="1GB")
    assert run((model, tokenizer))
    del model
    gc.collect()
    deadline = time.monotonic() + 5
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert held() == before
    assert mx.get_active_memory() - active <= 4096


def test_logging(directory: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]):
    logger = logging.getLogger("flash_moe_mlx")
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
    assert logger.level == logging.NOTSET
    with caplog.at_level(logging.DEBUG, "flash_moe_mlx"):
        model, tokenizer = flash_moe_mlx.load(directory, memory_limit="1GB")
        with model.streaming:
            first = list(caplog.records)
            run((model, tokenizer))
    told = [r.getMessage() for r in first if r.levelno == logging.INFO]
    assert any("dense weights" in m and "48 of 48 experts" in m and "pread" in m for m in told), told
    assert {r.name.split(".")[0] for r in caplog.records} == {"flash_moe_mlx"}
    debug = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert any(f"{len(PROMPT)} prompt tokens (0 cached), {TOKENS} tokens" in m for m in debug), debug
    assert capfd.readouterr() == ("", "")

"""Several clients at once on one server: complete answers, fair turns, memory counted before a request begins."""

import contextlib
import gc
import itertools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from typing import Any

import httpx
import pytest

import flash_moe_mlx
from flash_moe_mlx import RequestError
from flash_moe_mlx.runtime.batching import Batch
from flash_moe_mlx.runtime.generation import begin_answer, stream_generate
from flash_moe_mlx.runtime.steps import Steps
from flash_moe_mlx.server import concurrency
from flash_moe_mlx.server.config import ServerConfig
from flash_moe_mlx.server.worker import Worker

from ..support.concurrent_clients import CONVERSATIONS, Answer, ask
from ..support.models import forget_peak
from ..support.serving import CHAT, STORY, SUM, client, post, served, stats, wait_until

CONTEXT = 256
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sum"],
    "additionalProperties": False,
}
EXTRA: list[dict[str, Any]] = [
    {"messages": STORY, "max_tokens": 16, "temperature": 1.0, "seed": 7},
    {
        "messages": SUM,
        "max_tokens": 24,
        "response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}},
    },
    {"messages": STORY, "max_tokens": 16, "frequency_penalty": 1.0, "presence_penalty": 0.5},
]
ALL = [*CONVERSATIONS[:5], *EXTRA]


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    forget_peak()
    demo = files("flash_moe_mlx") / "demo"
    model, tokenizer = flash_moe_mlx.load(demo, memory_limit="40MB", max_context=CONTEXT)
    with model.streaming:
        yield model, tokenizer


@contextlib.contextmanager
def several(loaded: tuple[Any, Any], *, together: bool) -> Iterator[str]:
    """Serve up to eight clients at once, whose tokens are computed in this way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrency, "Batch", partial(Batch, together=together))
        with served(*loaded, max_concurrent=8, prefix_cache="3MB") as address:
            yield address


@pytest.fixture(scope="module")
def address(loaded: tuple[Any, Any]) -> Iterator[str]:
    with several(loaded, together=False) as address:
        yield address


@pytest.fixture(scope="module")
def alone(address: str) -> list[Answer]:
    """Each conversation's answer while nobody else asks."""
    return [ask(client(address), conversation, stream=False) for conversation in ALL]


def at_once(address: str, numbers: list[int]) -> list[Answer]:
    with ThreadPoolExecutor(len(numbers)) as threads:
        return list(threads.map(lambda n: ask(client(address), ALL[n], stream=n % 2 == 0), numbers))


def check_answers(numbers: list[int], answers: list[Answer]) -> None:
    for number, answer in zip(numbers, answers, strict=True):
        assert answer[3] in ("stop", "length", "tool_calls")
        assert answer[0] or answer[1]
        if "response_format" in ALL[number]:
            assert isinstance(json.loads(answer[2])["sum"], int)


@pytest.mark.parametrize("clients", [1, 2, 4, 8])
def test_all_clients_get_the_answers_that_they_get_alone(address: str, alone: list[Answer], clients: int):
    numbers = list(range(len(ALL)))[-clients:]
    answers = at_once(address, numbers)
    check_answers(numbers, answers)
    assert answers == [alone[number] for number in numbers]  # the same programs, so the same bits
    wait_until(lambda: stats(address)["running_requests"] == stats(address)["queued_requests"] == 0)


def test_shared_passes_give_complete_answers(loaded: tuple[Any, Any]):
    numbers = [0, 5, 6, 7]
    with several(loaded, together=True) as address:
        check_answers(numbers, at_once(address, numbers))


def test_one_that_leaves_changes_nothing_for_the_others(address: str, alone: list[Answer]):
    leaving = {"model": "demo", "messages": STORY, "temperature": 0, "stream": True, "logit_bias": {"2": -100}}
    with ThreadPoolExecutor(2) as threads:
        with httpx.stream("POST", f"{address}{CHAT}", json=leaving, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            wait_until(lambda: stats(address)["running_requests"] == 1)
            others = [threads.submit(ask, client(address), ALL[n], stream=True) for n in (0, 1)]
            wait_until(lambda: stats(address)["running_requests"] > 1 or all(other.done() for other in others))
        answers = [other.result(60) for other in others]
    assert answers == alone[:2]
    wait_until(lambda: stats(address)["running_requests"] == 0)


@pytest.mark.parametrize("max_concurrent", [1, 4])
def test_nothing_is_kept_of_clients_that_left(loaded: tuple[Any, Any], max_concurrent: int):
    """Arrays must not wait for the garbage collector: the memory limit doesn't count them."""
    leaving = {"model": "demo", "messages": STORY, "temperature": 0, "stream": True, "logit_bias": {"2": -100}}

    def leave(_: int) -> None:
        with httpx.stream("POST", f"{address}{CHAT}", json=leaving, timeout=60) as response:
            next(response.iter_lines())

    with served(*loaded, prefix_cache=None, max_concurrent=max_concurrent) as address:
        gc.collect()
        gc.disable()
        try:
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(leave, range(8)))
            wait_until(lambda: stats(address)["running_requests"] == stats(address)["queued_requests"] == 0)
            wait_until(lambda: not any(type(known) is Steps for known in gc.get_objects()))
        finally:
            gc.enable()


def test_a_fault_of_a_step_leaves_nobody_waiting(address: str, alone: list[Answer], monkeypatch: pytest.MonkeyPatch):
    step, calls = Batch.step, itertools.count()

    def fail_once(batch: Batch) -> Any:
        if next(calls) == 3:
            raise RuntimeError("a fault")
        return step(batch)

    monkeypatch.setattr(Batch, "step", fail_once)
    assert post(address, body={"messages": STORY}).status_code == 500
    assert ask(client(address), ALL[0], stream=False) == alone[0]
    assert stats(address)["running_requests"] == 0


def test_progress_and_errors_are_each_ones_own(address: str):
    with ThreadPoolExecutor(3) as threads:
        progress = {"messages": STORY, "max_tokens": 4, "stream": True, "return_progress": True}
        chunks = threads.submit(lambda: post(address, body=progress).text)
        too_long = threads.submit(lambda: post(address, body={"messages": STORY * 90, "max_tokens": 4}).status_code)
        whole = threads.submit(lambda: post(address, body={"messages": SUM}).status_code)
        assert '"prompt_progress"' in chunks.result(60)
        assert (too_long.result(60), whole.result(60)) == (400, 200)


def test_memory_is_counted_before_a_request_begins(monkeypatch: pytest.MonkeyPatch):
    """More clients than fit: some wait, all get their answers, and the limit holds."""
    forget_peak()
    demo = files("flash_moe_mlx") / "demo"
    model, tokenizer = flash_moe_mlx.load(demo, memory_limit="20MB", max_context=CONTEXT)
    counts: list[int] = []
    step, all_asked = Batch.step, threading.Event()

    def counted(batch: Batch) -> Any:
        assert all_asked.wait(60)
        counts.append(len(batch))
        return step(batch)

    monkeypatch.setattr(Batch, "step", counted)
    with model.streaming as engine, served(model, tokenizer, max_concurrent=8, prefix_cache=None) as address:
        fit = max(n for n in range(1, 8) if engine.has_room([CONTEXT] * n))
        assert 2 <= fit < 7  # 2 in float32, 4 in bfloat16
        with ThreadPoolExecutor(fit + 1) as threads:
            answers = [threads.submit(post, address, body={"messages": STORY}) for _ in range(fit + 1)]
            wait_until(lambda: stats(address)["running_requests"] + stats(address)["queued_requests"] == fit + 1)
            all_asked.set()
            reasons = [answer.result(60).json()["choices"][0]["finish_reason"] for answer in answers]
        assert reasons == ["stop"] * (fit + 1)
        assert max(counts) == fit
        assert engine.stats().peak_memory_bytes <= engine.limit_bytes


def test_greedy_tokens_of_shared_passes(loaded: tuple[Any, Any]):
    """How often a shared pass, whose products have other shapes, gives another token; docs/server.md says it."""
    model, tokenizer = loaded
    prompts = [
        tokenizer.apply_chat_template(conversation["messages"], tools=conversation.get("tools"))
        for conversation in CONVERSATIONS[:4]
    ]
    singles = [[r.token for r in stream_generate(model, tokenizer, prompt, 12)] for prompt in prompts]
    batch, received = Batch(model, together=True), {}
    members = [batch.add(begin_answer(model, tokenizer, prompt, 12)) for prompt in prompts]
    while len(batch):
        for outcome in batch.step():
            assert outcome.response is not None
            received.setdefault(outcome.member, []).append(outcome.response.token)
    total = sum(map(len, singles))
    same = sum(
        next((i for i, (a, b) in enumerate(zip(one, received[m], strict=False)) if a != b), len(one))
        for one, m in zip(singles, members, strict=True)
    )
    print(f"{total - same} of {total} tokens differ, or follow one that does")
    assert same > total / 2


def test_one_at_a_time_is_the_default(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(concurrency.Concurrency, "__init__", lambda *arguments: pytest.fail("must not be used"))
    assert ServerConfig("demo").max_concurrent == 1
    with served(*loaded, prefix_cache=None) as address:
        assert post(address, body={"messages": SUM}).status_code == 200


def test_bad_numbers_are_refused(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RequestError, match="max_concurrent"):
        ServerConfig("demo", max_concurrent=0)
    monkeypatch.setattr(type(loaded[0].streaming), "ranks", property(lambda engine: 2))
    with pytest.raises(RequestError, match="ranks"):
        Worker(*loaded, max_queue=1, max_concurrent=2, prefix_cache=None)

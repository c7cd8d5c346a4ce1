"""Several generations at once: each gets the tokens of its single run, whoever comes, goes or fails beside it."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flash_moe_mlx
from flash_moe_mlx import PrefixCache, StoreError, stream_generate
from flash_moe_mlx.runtime import batching
from flash_moe_mlx.runtime.batching import Batch, Member
from flash_moe_mlx.runtime.generation import begin_answer
from flash_moe_mlx.server.sampling import sampler_for
from flash_moe_mlx.server.schema import Sampling

from ..support.models import VOCABULARY, chat_config, make_converted

Loaded = tuple[Any, TokenizerWrapper]
RNG = np.random.default_rng(12)
PROMPTS = [RNG.integers(1, VOCABULARY, length).tolist() for length in (9, 1, 17, 30, 4, 12, 2, 23)]
LENGTHS = [9, 3, 6, 10, 1, 4, 8, 5]
WAYS = pytest.mark.parametrize("together", [False, True], ids=["in turn", "together"])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    config = chat_config(num_experts=16, num_experts_per_tok=2)
    path: Path = make_converted(tmp_path_factory.mktemp("checkpoint"), bits=4, config=config)
    model, tokenizer = flash_moe_mlx.load(path, memory_limit="1GB")
    tokenizer.eos_token_ids = set()
    with model.streaming:
        yield model, tokenizer


@pytest.fixture(scope="module")
def singles(loaded: Loaded) -> list[list[int]]:
    return [alone(loaded, number) for number in range(len(PROMPTS))]


def alone(loaded: Loaded, number: int, **options: Any) -> list[int]:
    return [r.token for r in stream_generate(*loaded, PROMPTS[number], LENGTHS[number], **options)]


def add(batch: Batch, loaded: Loaded, number: int, **options: Any) -> Member:
    return batch.add(begin_answer(*loaded, PROMPTS[number], LENGTHS[number], **options))


def run(batch: Batch, received: dict[Member, list[Any]], steps: int | None = None) -> None:
    """Advance it by so many steps, or to the end; collects tokens and errors."""
    while len(batch) and steps != 0:
        for outcome in batch.step():
            got = received.setdefault(outcome.member, [])
            got += [] if outcome.response is None else [outcome.response.token]
            got += [] if outcome.error is None else [outcome.error]
        steps = None if steps is None else steps - 1


@WAYS
@pytest.mark.parametrize("size", [1, 8])
def test_each_gets_the_tokens_of_its_single_run(loaded: Loaded, singles: list[list[int]], size: int, together: bool):
    """Some join while others are under way, and they end one after the other."""
    batch, received = Batch(loaded[0], together=together), {}
    members = [add(batch, loaded, number) for number in range(size - size // 4)]
    run(batch, received, 8)
    members += [add(batch, loaded, number) for number in range(size - size // 4, size)]
    run(batch, received)
    assert [received[member] for member in members] == singles[:size]


def test_ways_may_change_at_any_step(loaded: Loaded, singles: list[list[int]]):
    batch, received, ways = Batch(loaded[0]), {}, iter([True, True, False] * 100)
    batch._choose = lambda size: next(ways)  # type: ignore[method-assign]
    members = [add(batch, loaded, number) for number in (0, 3, 6)]
    run(batch, received)
    assert [received[member] for member in members] == [singles[number] for number in (0, 3, 6)]


@WAYS
def test_seeds_and_penalties_are_each_ones_own(loaded: Loaded, together: bool):
    def options(number: int) -> dict[str, Any]:
        return {"sampler": sampler_for(Sampling(temperature=1.0, seed=number), VOCABULARY)}

    expected = [alone(loaded, number, **options(number)) for number in (0, 2, 3)]
    batch, received = Batch(loaded[0], together=together), {}
    members = [add(batch, loaded, number, **options(number)) for number in (0, 2, 3)]
    run(batch, received)
    assert [received[member] for member in members] == expected


@WAYS
def test_one_that_leaves_changes_nothing_for_the_others(loaded: Loaded, singles: list[list[int]], together: bool):
    batch, received = Batch(loaded[0], together=together), {}
    members = [add(batch, loaded, number) for number in (0, 3, 6)]
    while len(received.get(members[1], [])) < 3:
        run(batch, received, 1)
    before = loaded[0].streaming.debug_state().reserved_state_bytes
    batch.remove(members[1])
    batch.remove(members[1])
    run(batch, received, 1)
    assert loaded[0].streaming.debug_state().reserved_state_bytes < before
    run(batch, received)
    assert [received[member] for member in (members[0], members[2])] == [singles[0], singles[6]]
    assert received[members[1]] == singles[3][: len(received[members[1]])]
    del batch, members, received
    assert loaded[0].streaming.debug_state().reserved_state_bytes == 0


@WAYS
def test_one_that_fails_changes_nothing_for_the_others(loaded: Loaded, singles: list[list[int]], together: bool):
    def fail_late(tokens: mx.array, logits: mx.array) -> mx.array:
        if len(tokens) > len(PROMPTS[3]) + 4:
            raise StoreError("[test] must fail.")
        return logits

    batch, received = Batch(loaded[0], together=together), {}
    members = [add(batch, loaded, 0), add(batch, loaded, 3, logits_processors=[fail_late]), add(batch, loaded, 6)]
    run(batch, received)
    assert [received[member] for member in (members[0], members[2])] == [singles[0], singles[6]]
    assert received[members[1]][:-1] == singles[3][:5]
    assert isinstance(received[members[1]][-1], StoreError)


def test_a_shared_pass_ends_early_only_if_all_have_left(
    loaded: Loaded, singles: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    clock = itertools.count()
    monkeypatch.setattr(
        "time.perf_counter", lambda: float(next(clock))
    )  # neither answer may end before the other begins
    batch, received = Batch(loaded[0], together=True), {}
    events = [threading.Event(), threading.Event()]
    members = [batch.add(begin_answer(*loaded, PROMPTS[n], 12), event) for n, event in zip((0, 3), events, strict=True)]
    while min(len(received.get(member, [])) for member in members) < 3:
        run(batch, received, 1)
    events[0].set()
    before = len(received[members[1]])
    run(batch, received, 1)
    assert [type(token) for token in received[members[1]][before:]] == [int]
    events[1].set()
    run(batch, received)
    assert all(isinstance(received[member][-1], CancelledError) for member in members)
    again: dict[Member, list[Any]] = {}
    members = [add(batch, loaded, number) for number in (0, 3)]
    run(batch, again)
    assert [again[member] for member in members] == [singles[0], singles[3]]


@WAYS
def test_tokens_keep_coming_while_a_long_prompt_is_read(loaded: Loaded, together: bool):
    batch, received = Batch(loaded[0], together=together), {}
    short = [batch.add(begin_answer(*loaded, PROMPTS[n], 30)) for n in (0, 3)]
    run(batch, received, 6)
    begun = len(received[short[0]])
    prompt = RNG.integers(1, VOCABULARY, 81).tolist()
    long = batch.add(begin_answer(*loaded, prompt, 4, prefill_step_size=8))
    while long not in received:
        run(batch, received, 1)
    assert len(received[short[0]]) >= begun + 10  # one token per chunk of eight, at least
    run(batch, received)
    assert received[long] == [r.token for r in stream_generate(*loaded, prompt, 4, prefill_step_size=8)]


def test_a_step_of_no_answers_does_nothing(loaded: Loaded):
    """All that waited may have left."""
    assert Batch(loaded[0]).step() == []


@pytest.mark.parametrize(
    ("waiting", "seconds", "tokens"),
    [(2.0, 1e9, 1), (0.0, 0.0, 1), (0.0, 1e9, None)],
    ids=["in memory", "reads, time is up", "reads"],
)
def test_a_turn_lasts_while_experts_are_read(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, waiting: float, seconds: float, tokens: int | None
):
    """Answers would take experts from each other at every token. A turn ends all the same."""
    monkeypatch.setattr(batching, "WAITING_SHARE", waiting)
    monkeypatch.setattr(batching, "TURN_SECONDS", seconds)
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))  # prompts take as long as tokens
    batch, order = Batch(loaded[0], together=False), []
    members = [batch.add(begin_answer(*loaded, PROMPTS[n], 9)) for n in (1, 6)]
    received: dict[Member, list[Any]] = {}
    while len(received) < 2:
        run(batch, received, 1)
    while len(batch) == 2:
        order += [members.index(outcome.member) for outcome in batch.step()]
    lengths = {len(list(group)) for _, group in itertools.groupby(order)}
    assert lengths == {len(order) if tokens is None else tokens}


@WAYS
def test_prompts_are_read_by_turns(loaded: Loaded, together: bool):
    """A short prompt that comes later is not kept waiting by a long one."""
    batch, received = Batch(loaded[0], together=together), {}
    long = batch.add(begin_answer(*loaded, RNG.integers(1, VOCABULARY, 81).tolist(), 2, prefill_step_size=8))
    run(batch, received, 3)
    short = add(batch, loaded, 0)
    while short not in received:
        run(batch, received, 1)
    assert long not in received


@WAYS
def test_prefix_states_are_kept_and_used(loaded: Loaded, together: bool):
    with PrefixCache(loaded[0], "50MB") as prefixes:
        batch, received = Batch(loaded[0], together=together), {}
        members = [add(batch, loaded, number, prefix_cache=prefixes) for number in (0, 3)]
        run(batch, received)
        for number, member in zip((0, 3), members, strict=True):
            history = [*PROMPTS[number], *received[member], 5]
            kept = prefixes.fetch(history)[0]
            assert [type(cache) for cache in kept] == [type(cache) for cache in loaded[0].make_cache()]
            fresh = [r.token for r in stream_generate(*loaded, history, 4)]
            responses = list(stream_generate(*loaded, history, 4, prefix_cache=prefixes))
            assert responses[0].cached_tokens == len(history) - 2
            assert [r.token for r in responses] == fresh


def test_quantised_caches_run_in_turn(loaded: Loaded, singles: list[list[int]]):
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 4}
    expected = alone(loaded, 0, **options)
    batch, received = Batch(loaded[0], together=True), {}
    members = [add(batch, loaded, 0, **options), add(batch, loaded, 3), add(batch, loaded, 6)]
    run(batch, received)
    assert [received[member] for member in members] == [expected, singles[3], singles[6]]

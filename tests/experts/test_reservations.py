"""Memory that conversations and passes take from a limit, as long as they live and no longer."""

import gc
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import flash_moe_mlx
from flash_moe_mlx import MemoryLimitError, PrefixCache, stream_generate
from flash_moe_mlx.experts.reservations import RELEASE_PASSES, Reservations

from ..support.models import VOCABULARY, chat_config, forget_peak, make_converted, smallest_limit

RNG = np.random.default_rng(3)
CONTEXT = 1024


class Costs:
    """One byte per token of state, ten per new token."""

    dense_bytes = load_bytes = kept_bytes = 0

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * length

    def scratch_bytes(self, batch: int, tokens: int, length: int) -> int:
        return 10 * batch * tokens


class Cache:
    """Stands for a list's first cache."""


PROMISED = (1, 10, 100)  # 100 of states, 100 of scratch


def reserved(reservations: Reservations, *size: int, caches: Any = ()) -> int:
    """Make a pass; bytes that are reserved during it."""
    room = reservations.change(reservations.needed(*size, caches))
    if room is not None:
        reservations.reserve(room)
    reservations.note(caches, size[0], size[2])
    return reservations.reserved.nbytes


def test_within_what_was_promised_nothing_changes() -> None:
    reservations = Reservations(Costs(), *PROMISED)
    first, second = [Cache()], [Cache()]
    assert reserved(reservations, 1, 10, 90, caches=first) == 200
    assert reserved(reservations, 1, 1, 50, caches=second) == 200
    assert reservations.state_bytes == 140


def test_others_count_while_they_live_and_no_longer() -> None:
    reservations = Reservations(Costs(), *PROMISED)
    kept = [[Cache()] for _ in range(4)]
    for caches in kept:
        reserved(reservations, 1, 10, 100, caches=caches)
    assert reservations.reserved.nbytes == 4 * 100 + 100
    assert reservations.least().nbytes == 500
    del kept, caches
    assert reservations.state_bytes == 0
    assert reservations.least().nbytes == 200


def test_memory_goes_back_once_nothing_has_needed_it_for_a_while() -> None:
    reservations = Reservations(Costs(), *PROMISED)
    assert reserved(reservations, 4, 10, 100) == 800
    sizes = [reserved(reservations, 1, 1, 50) for _ in range(RELEASE_PASSES - 1)]
    assert set(sizes) == {800}
    assert reserved(reservations, 1, 1, 50) == 200
    assert reserved(reservations, 1, 1, 50) == 200


def test_what_alternates_stays_reserved() -> None:
    reservations = Reservations(Costs(), *PROMISED)
    for _ in range(3 * RELEASE_PASSES):
        assert reserved(reservations, 4, 10, 100) == 800
        assert reserved(reservations, 1, 1, 50) == 800
    # The largest of the last passes is what remains.
    for _ in range(2 * RELEASE_PASSES):
        reserved(reservations, 2, 10, 100)
    assert reservations.reserved.nbytes == 400


def test_a_batch_that_shrinks_counts_less_and_a_cache_that_is_cut_back_does_not() -> None:
    reservations, caches = Reservations(Costs(), *PROMISED), [Cache()]
    reserved(reservations, 4, 1, 100, caches=caches)
    reserved(reservations, 2, 1, 100, caches=caches)
    assert reservations.state_bytes == 200
    reserved(reservations, 2, 1, 50, caches=caches)
    assert reservations.state_bytes == 200


def test_an_id_that_is_used_again_is_another_conversation() -> None:
    reservations = Reservations(Costs(), *PROMISED)
    for length in itertools.islice(itertools.cycle([100, 50]), 200):
        caches = [Cache()]
        reserved(reservations, 1, 1, length, caches=caches)
        assert reservations.state_bytes == length
        del caches


def test_caches_may_be_collected_on_any_thread_at_any_moment() -> None:
    """They were entries of a table that other threads changed while it was being walked."""
    reservations, stop, lock = Reservations(Costs(), *PROMISED), threading.Event(), threading.Lock()

    def come_and_go() -> None:
        while not stop.is_set():
            kept = [[Cache()] for _ in range(50)]
            with lock:
                for caches in kept:
                    reservations.note(caches, 1, 7)

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3000):
        with lock:
            assert reservations.state_bytes % 7 == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert reservations.state_bytes == 0


# --- with a model ---


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("reservations"), config=chat_config(num_experts=24), bits=4)


@pytest.fixture
def loaded(directory: Path) -> Iterator[tuple[Any, Any]]:
    limit = smallest_limit(directory, max_context=CONTEXT) + 1_500_000
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit=limit, max_context=CONTEXT)
    with model.streaming:
        yield model, tokenizer


def prompt(length: int) -> list[int]:
    return RNG.integers(1, VOCABULARY, length).tolist()


def always_one(logprobs: mx.array) -> mx.array:
    """Choose a token that ends no answer."""
    return mx.array([1])


def test_caches_that_a_caller_keeps_are_counted(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    engine, kept, slots = model.streaming, [], engine_slots(model)
    forget_peak()

    def keep_many() -> None:
        for _ in range(200):
            caches = model.make_cache()
            list(stream_generate(model, tokenizer, prompt(500), 2, prompt_cache=caches))
            kept.append(caches)

    with pytest.raises(MemoryLimitError, match="other sequences"):
        keep_many()
    assert len(kept) > 2
    assert engine_slots(model) < slots
    assert engine.stats().peak_memory_bytes <= engine.stats().memory_limit_bytes
    answer = stream_generate(model, tokenizer, [5, 6, 7], 3, sampler=always_one, prompt_cache=kept[0])
    assert len(list(answer)) == 3  # one that has begun may continue
    kept.clear()
    for _ in range(RELEASE_PASSES):
        list(stream_generate(model, tokenizer, prompt(5), 2))
    assert engine_slots(model) == slots


def engine_slots(model: Any) -> int:
    return int(model.streaming.stats().num_slots)


def several(model: Any, tokenizer: Any, number: int, length: int) -> None:
    generations = [stream_generate(model, tokenizer, prompt(length), 1000) for _ in range(number)]
    try:
        for generation in generations:
            next(generation)
    finally:
        for generation in generations:
            generation.close()


def batch(model: Any, size: int) -> None:
    caches = [type(cache).merge([cache] * size) for cache in model.make_cache()]
    mx.eval(model(mx.array(RNG.integers(1, VOCABULARY, (size, 64))), cache=caches, logits_to_keep=1))


@pytest.mark.parametrize("what", ["several", "refused", "batch", "refused-batch", "dropped-prefix-cache", "threads"])
def test_what_ended_takes_nothing_from_what_comes(loaded: tuple[Any, Any], what: str) -> None:
    model, tokenizer = loaded
    engine, slots = model.streaming, engine_slots(model)
    limit = engine.stats().memory_limit_bytes
    spare = 500_000
    if what == "several":
        several(model, tokenizer, 3, 600)
    elif what == "refused":
        with pytest.raises(MemoryLimitError):
            several(model, tokenizer, 40, 1000)
    elif what == "batch":
        batch(model, 4)
    elif what == "refused-batch":
        with pytest.raises(MemoryLimitError):
            batch(model, 400)
    elif what == "dropped-prefix-cache":
        PrefixCache(model, spare)
    else:
        dying = [threading.Thread(target=lambda: next(stream_generate(model, tokenizer, prompt(600)))) for _ in "123"]
        for thread in dying:
            thread.start()
        for thread in dying:
            thread.join()
    gc.collect()
    with PrefixCache(model, spare):
        pass
    engine.resize(limit - spare)
    engine.resize(limit)
    assert engine_slots(model) == slots
    assert len(list(stream_generate(model, tokenizer, prompt(CONTEXT - 10), 3, sampler=always_one))) == 3


def test_two_growing_prompts_leave_the_experts_where_they_are(loaded: tuple[Any, Any]) -> None:
    """A share that changes keeps what fits: it was emptied, so that each chunk of either prompt read all again."""
    model, tokenizer = loaded
    engine = model.streaming
    long, other = prompt(900), prompt(900)
    alone = []
    for tokens in (long, other):
        generation = stream_generate(model, tokenizer, tokens, 3, prefill_step_size=100)
        before = engine.counters.bytes_read
        alone.append([r.token for r in generation])
        last = engine.counters.bytes_read - before
    first = stream_generate(model, tokenizer, long, 3, prefill_step_size=100)
    second = stream_generate(model, tokenizer, other, 3, prefill_step_size=100)
    before = engine.counters.bytes_read
    tokens = [[r.token for r in pair] for pair in zip(*zip(first, second, strict=True), strict=True)]
    assert tokens == alone
    assert engine.counters.bytes_read - before < 3 * max(last, 100_000)


def test_resized_up_and_down_in_the_middle(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    engine, tokens = model.streaming, prompt(40)
    limit = engine.stats().memory_limit_bytes
    expected = [r.token for r in stream_generate(model, tokenizer, tokens, 20)]
    got = []
    for response, size in zip(
        stream_generate(model, tokenizer, tokens, 20),
        itertools.cycle([limit - 700_000, limit, limit - 1_000_000]),
        strict=False,
    ):
        got.append(response.token)
        engine.resize(size)
        assert engine.stats().memory_limit_bytes == size
    assert got == expected
    hits = engine.counters.copy()
    engine.resize(limit)
    list(stream_generate(model, tokenizer, tokens, 2))
    assert engine.counters.since(hits).hits > 0


@pytest.mark.parametrize("lengths", [[100], [5, 5], [100, 3, 40], [90] * 12])
def test_rooms_of_sequences_at_once_hold_every_pass(lengths: list[int]):
    """In whichever order their prompts are read, and however many of them are merged into one batch."""
    reservations = Reservations(Costs(), *PROMISED)
    largest = max(reservations.least().nbytes, *(room.nbytes for room in reservations.together(lengths)))

    def prompts_read(lengths: list[int]) -> list[list[Cache]]:
        alone = [[Cache()] for _ in lengths]
        for caches, length in zip(alone, lengths, strict=True):
            assert reservations.needed(1, min(10, length), length, caches).nbytes <= largest
            reservations.note(caches, 1, length)
        return alone

    for size in range(1, len(lengths) + 1):
        others = prompts_read(lengths[size:])
        merged = [Cache()]
        assert reservations.needed(size, 1, max(lengths), merged).nbytes <= largest
        del others, merged
    everybody = prompts_read(lengths)
    assert len(everybody) == len(lengths)


def test_room_for_sequences_at_once(directory: Path):
    """Counts states and scratch of all; what fits can then be had."""
    limit = smallest_limit(directory, max_context=CONTEXT)
    with flash_moe_mlx.load_model(directory, memory_limit=limit, max_context=CONTEXT).streaming as engine:
        assert engine.has_room([CONTEXT])
        assert not engine.has_room([CONTEXT] * 2)
        engine.resize(limit + 20_000_000)
        fit = max(n for n in range(1, 100) if engine.has_room([CONTEXT] * n))
        assert 1 < fit < 99
        with engine.forward_pass(fit, 1, CONTEXT):
            pass
        with pytest.raises(MemoryLimitError), engine.forward_pass(4 * fit, 1, CONTEXT):
            pass

"""Ctrl-C while a model generates: it stays usable, and what it says next is right."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.experts import local
from flash_moe_mlx.ops.expert_batch import expert_ffn_grouped
from flash_moe_mlx.storage.store import ReadRequest

from ..support.faulty_models import OTHER, PROMPT, Loaded, inject, run
from ..support.interrupts import READS, interrupted_at
from ..support.stores import FaultyPreadv


@pytest.mark.parametrize("count", [0, 7, 40], ids="read {}".format)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_waiting_for_a_read(
    loaded: Loaded, expected: dict[int, list[int]], count: int, error: type[BaseException]
):
    """Reads are still under way when it comes: they must not land in slots that others have by then."""
    model, _ = loaded
    store = inject(model, lambda layer, expert: None)
    waits = iter(range(10**9))
    submit = store.submit

    def interrupted(requests: Sequence[ReadRequest]) -> Any:
        if next(waits) != count:
            return submit(requests)
        store.delay = 0.5
        pending = submit(requests)
        time.sleep(0.05)  # the batch has begun, and will end long after the interrupt
        store.delay = 0
        pending.wait = lambda: (_ for _ in ()).throw(error())
        return pending

    store.submit = interrupted
    with pytest.raises(error):
        run(loaded)
    assert run(loaded) == expected[17]
    assert run(loaded, OTHER) == expected[5]


def test_an_interrupt_in_a_real_wait(loaded: Loaded, expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C as it comes: a signal in the main thread, while I/O threads are reading."""

    def fault(number: int, offset: int, wanted: int) -> None:
        if number == 40:
            os.kill(os.getpid(), signal.SIGINT)

    reads = FaultyPreadv(fault)
    monkeypatch.setattr(os, "preadv", reads)
    with pytest.raises(KeyboardInterrupt):
        run(loaded)
    assert reads.calls > 40
    assert reads.running == 0
    assert run(loaded) == expected[17]


def test_no_read_outlives_an_interrupted_pass(
    loaded: Loaded, expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
):
    """A prompt's next group is being read while one is computed: it is waited for before the caller continues."""
    model, _ = loaded
    store = inject(model, lambda layer, expert: None)
    store.delay = 0.1
    under_way: list[bool] = []

    def interrupted(*arguments: Any) -> mx.array:
        under_way.append(not store._batches[-1].done())
        if under_way[-1]:
            raise KeyboardInterrupt
        return expert_ffn_grouped(*arguments)

    monkeypatch.setattr(local, "expert_ffn_grouped", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(loaded)
    assert under_way[-1]
    assert store._batches[-1].done()
    store.delay = 0
    monkeypatch.undo()
    assert run(loaded) == expected[17]


def is_free(lock: Any) -> bool:
    """Return whether another thread could take it."""
    free: list[bool] = []

    def take() -> None:
        free.append(lock.acquire(blocking=False))
        if free[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return free[0]


def test_an_interrupt_anywhere_in_a_step(loaded: Loaded):
    """Ctrl-C comes where it likes: the steps after it are right, and another thread gets its turn."""
    model, _ = loaded
    steps = [mx.array([[token]]) for token in PROMPT[:3]]
    right = [np.array(model(step).astype(mx.float32)) for step in steps]
    place = 1
    while interrupted_at(place, lambda: mx.eval(model(steps[0]))):
        assert is_free(model.streaming.lock), f"locked by an interrupt at {place}"
        for step, logits in zip(steps[1:], right[1:], strict=True):
            assert np.array_equal(np.array(model(step).astype(mx.float32)), logits), (
                f"wrong after an interrupt at {place}"
            )
        place += 11
    assert place > 200


def test_an_interrupt_anywhere_in_a_read(loaded: Loaded):
    """Nobody is left waiting.

    Locks that Python's own classes hold (Event, Semaphore, Future) stay locked if it comes between two of their
    instructions, and the I/O threads would wait for them for ever.
    """
    store = loaded[0].streaming.debug_state().store
    layout = store.checkpoint.layout(0)
    whole, buffer = (bytearray(layout.record_bytes) for _ in range(2))
    store.read_into([ReadRequest(0, 0, memoryview(whole))])
    requests = [ReadRequest(0, expert, memoryview(buffer)) for expert in (1, 0)]
    place = 1
    while interrupted_at(place, lambda: store.read_into(requests), READS):
        store.drain()
        store.read_into(requests[1:])
        assert buffer == whole, f"wrong after an interrupt at {place}"
        place += 1
    assert place > 50

"""Faults at the Nth operation of a request, and what must hold after each: the rows of docs/faults.md are run by it."""

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import stream_generate
from flash_moe_mlx.errors import FlashMoEError
from flash_moe_mlx.experts.policies import AgedLFU

from .refusals import held, wait_until_gone
from .stores import FaultyPreadv

SAME_BITS = "same bits"
"""Outcome of a fault that no caller notices."""


@dataclass
class Strike:
    """One fault, about to happen at the Nth operation.

    Attributes:
        shard: The file that experts are read from.
        engine: The model's engine.
        repair: Called once the request has ended, whatever it ended in.
        struck: Whether it has happened.
    """

    shard: Path
    engine: Any
    repair: list[Callable[[], object]] = field(default_factory=list)
    struck: bool = False


Fault = Callable[[Strike], int | None]

SLACK_BYTES = 4096
"""Memory that may be in use besides what was before: small arrays that modules remember."""


def interrupted(strike: Strike) -> None:
    raise InterruptedError(errno.EINTR, "Interrupted system call")


def broken(strike: Strike) -> None:
    raise OSError(errno.EIO, "Input/output error")


def short(strike: Strike) -> int:
    return 100


def no_memory(strike: Strike) -> None:
    raise MemoryError


def hangs(strike: Strike) -> None:
    """Wait until the request has ended; the limit is short from here on, so that no busy machine passes it before."""
    progress, answers = strike.engine.debug_state().store._progress, threading.Event()
    before, progress.seconds = progress.seconds, 0.1

    def repair() -> None:
        progress.seconds = before
        answers.set()
        settle(strike.engine)

    strike.repair.append(repair)
    answers.wait(60)


def truncated(strike: Strike) -> None:
    status, whole = strike.shard.stat(), strike.shard.read_bytes()

    def repair() -> None:
        strike.shard.write_bytes(whole)  # in place: the same file that is open
        os.utime(strike.shard, ns=(status.st_atime_ns, status.st_mtime_ns))

    strike.repair.append(repair)
    os.truncate(strike.shard, 100)


def rewritten(strike: Strike) -> None:
    """Somebody writes to the file: its bytes may be others, and its time says so."""
    status = strike.shard.stat()
    strike.repair.append(lambda: os.utime(strike.shard, ns=(status.st_atime_ns, status.st_mtime_ns)))
    os.utime(strike.shard, ns=(status.st_atime_ns, status.st_mtime_ns + 3600 * 10**9))


def replaced(strike: Strike) -> None:
    """Another file takes the name: the one that is open stays."""
    aside, other = strike.shard.with_suffix(".aside"), strike.shard.with_suffix(".other")
    os.link(strike.shard, aside)
    other.write_bytes(bytes(strike.shard.stat().st_size))
    os.replace(other, strike.shard)
    strike.repair.append(lambda: os.replace(aside, strike.shard))


def settle(engine: Any) -> None:
    """Wait until no read is under way."""
    store, end = engine.debug_state().store, time.monotonic() + 60
    while store._under_way:
        assert time.monotonic() < end, "a read never ended"
        time.sleep(0.005)


def fresh(engine: Any) -> None:
    """Forget experts and how they were used, so that the next request's operations are those of the last."""
    engine.resize(engine.limit_bytes)  # what a batch has taken from the slots comes back
    engine.clear()
    cache = engine.debug_state().cache
    for layer, slots in cache.layers.items():
        cache._policies[layer] = slots._policy = AgedLFU()


def answer(loaded: Any, prompt: list[int], count: int) -> list[tuple[int, bytes]]:
    """Tokens and all bits of their log-probabilities."""
    return [
        (response.token, np.array(response.logprobs.astype(mx.float32)).tobytes())
        for response in stream_generate(*loaded, prompt, count)
    ]


@contextmanager
def striking(strike: Strike, fault: Fault, at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyPreadv]:
    """Let ``os.preadv`` meet the fault at call ``at``; counts calls if ``at`` is negative."""

    def happen(number: int, offset: int, wanted: int) -> int | None:
        if number != at:
            return None
        strike.struck = True
        return fault(strike)

    reads = FaultyPreadv(happen)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", reads)
        yield reads


def outcome(call: Callable[[], object]) -> str:
    """Name of the typed error that a call raises, or of an answer that can't be told from an undisturbed one."""
    try:  # not pytest.raises: it would keep what the frames hold
        call()
    except FlashMoEError as error:
        return type(error).__name__ if str(error).startswith("[") else f"not in the house's form: {error}"
    return SAME_BITS


def assert_slots_whole(engine: Any) -> None:
    """Every slot is either free or holds one expert."""
    for layer, slots in engine.debug_state().layers.items():
        if slots.unsettled:
            continue  # freed on the layer's next use, once nothing writes there
        taken = [*slots.present.values(), *slots.free]
        assert sorted(taken) == list(range(slots.num_slots)), f"layer {layer} has lost a slot"
        assert not slots.filling


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """No thread, no file and no array stays behind."""
    mx.synchronize()
    before, active = held(), mx.get_active_memory()
    yield
    gc.collect()
    wait_until_gone(before)
    end = time.monotonic() + 10
    while (more := mx.get_active_memory() - active) > SLACK_BYTES:  # arrays that another thread is just dropping
        assert time.monotonic() < end, f"{more} bytes more than before"
        time.sleep(0.01)
        gc.collect()

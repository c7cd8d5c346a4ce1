"""The store's threads and latch: every job runs, nobody waits for ever, whatever is interrupted."""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from flash_moe_mlx.errors import StoreError
from flash_moe_mlx.storage.io_threads import IOThreads, Latch

from ..support.interrupts import READS, interrupted_at


@pytest.fixture
def threads() -> Iterator[IOThreads]:
    made = IOThreads(2, "jobs")
    yield made
    made.close()


def alive(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def finishes(threads: IOThreads) -> bool:
    """Return whether a job that is submitted now is run."""
    ran = threading.Semaphore(0)
    threads.submit(ran.release)
    return ran.acquire(timeout=30)


def test_jobs_run_on_as_many_threads_as_asked_for(threads: IOThreads):
    meet = threading.Barrier(2)
    names: set[str] = set()

    def job() -> None:
        names.add(threading.current_thread().name)
        meet.wait(30)

    for _ in range(20):
        threads.submit(job)
    threads.close()
    assert names == {"jobs_0", "jobs_1"}
    assert alive("jobs") == 0


def test_closing_runs_what_was_submitted_and_takes_no_more(threads: IOThreads):
    ran: list[int] = []
    for number in range(50):
        threads.submit(lambda number=number: ran.append(number))
    threads.close()
    threads.close()
    assert sorted(ran) == list(range(50))
    with pytest.raises(StoreError):
        threads.submit(lambda: None)


def test_threads_end_with_the_last_reference():
    forgotten = IOThreads(3, "forgotten")
    assert finishes(forgotten)
    assert alive("forgotten") == 3
    del forgotten
    gc.collect()
    assert alive("forgotten") == 0


def test_the_interpreters_end_waits_for_a_job():
    script = """
import time
from flash_moe_mlx.storage.io_threads import IOThreads
threads = IOThreads(1, "last")
threads.submit(lambda: (time.sleep(0.3), print("done")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "done\n" and done.stderr == ""


def test_a_latch_opens_for_all_who_wait():
    latch, passed = Latch(), []
    waiting = [threading.Thread(target=lambda: (latch.wait(), passed.append(1))) for _ in range(4)]
    for thread in waiting:
        thread.start()
    time.sleep(0.12)  # longer than a poll
    assert not latch.is_open() and passed == []
    latch.open()
    latch.open()
    for thread in waiting:
        thread.join(30)
    latch.wait()
    assert latch.is_open() and passed == [1] * 4


def test_an_interrupt_anywhere_in_a_start_or_a_wait():
    """Threads are started anew each time; one that an interrupt lost at its start is replaced."""
    place = 1
    while True:
        threads, latch = IOThreads(2, "interrupted"), Latch()

        def both(threads: IOThreads = threads, latch: Latch = latch) -> None:
            try:
                threads.submit(latch.open)
            except RuntimeError as error:  # what threading.Thread.start makes of it, at some places
                raise error.__context__ or error from None
            latch.wait()

        interrupted = interrupted_at(place, both, READS)
        assert finishes(threads), f"hangs after an interrupt at {place}"
        latch.open()
        latch.wait()
        threads.close()
        if not interrupted:
            break
        place += 1
    assert place > 20

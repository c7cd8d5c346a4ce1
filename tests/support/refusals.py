"""The form of every refusal, which must leave nothing behind."""

import gc
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe_mlx.errors import FlashMoEError

MESSAGE = r"(?s)\[[^\]]+\] .+, got .+\. [A-Z].+[.\"]\Z"
"""`[where] what must hold, got what. What to do.`"""


def held() -> set[object]:
    """Threads, and what files are open (Linux): nothing new may be among them afterwards."""
    files: set[object] = set()
    for number in os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else ():
        with suppress(OSError):  # the listing's own
            name = os.readlink(f"/proc/self/fd/{number}").removesuffix(" (deleted)")
            files.add(f"{number} {name}")
    return files | set(threading.enumerate())


def wait_until_gone(before: set[object]) -> None:
    """Wait until there are no other threads and files than there were.

    Threads of other libraries let go late: MLX's readers, say, drop their file after the read has been reported.
    """
    end = time.monotonic() + 10
    while more := {one for one in held() - before if type(one).__name__ != "WorkerThread"}:  # AnyIO's, for 10 s
        assert time.monotonic() < end, f"left behind: {sorted(map(str, more))}"
        gc.collect()  # slow: only where a cycle may hold something
        time.sleep(0.01)


def assert_refused(call: Callable[[], object], kind: type[FlashMoEError], words: str) -> None:
    """A typed error with a message in the house's form; no thread, no file and no weight left behind."""
    mx.synchronize()
    before, active = held(), mx.get_active_memory()
    try:  # not pytest.raises: it would keep what the frames hold
        call()
    except FlashMoEError as error:
        got, message = type(error), str(error)
    else:
        pytest.fail("nothing was raised")
    assert got is kind, message
    assert re.search(words, message), message
    assert re.match(MESSAGE, message), f"not in the house's form: {message}"
    wait_until_gone(before)
    assert mx.get_active_memory() <= active + 4096

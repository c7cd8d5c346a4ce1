"""The form of every refusal, which must leave nothing behind."""

import gc
import os
import re
import threading
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
    if not held() <= before:
        gc.collect()  # slow: only where a cycle may hold something
    assert held() <= before
    assert mx.get_active_memory() <= active + 4096

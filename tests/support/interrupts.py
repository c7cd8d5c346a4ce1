"""A KeyboardInterrupt at a chosen instruction, as if Ctrl-C had come just then."""

import dis
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

INTERRUPTIBLE = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME")}
"""Instructions after which CPython looks for signals: no other place can be hit by Ctrl-C."""

ENGINE = ("/cache.py", "/engine.py", "/reader.py", "/local.py", "/moe_block.py")
READS = (
    "/store.py",
    "/pending_reads.py",
    "/read_progress.py",
    "/io_threads.py",
    "/threading.py",
    "/thread.py",
    "/_base.py",
)
"""The store, its threads, and what of the standard library either may use."""


def interrupted_at(place: int, call: Callable[[], object], files: tuple[str, ...] = ENGINE) -> bool:
    """Call with a KeyboardInterrupt at the given place of these files, counted as they run."""
    count = 0
    last: dict[FrameType, int] = {}

    def local(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if event == "opcode":
            count += last.get(frame) in INTERRUPTIBLE
            last[frame] = frame.f_code.co_code[frame.f_lasti]
            if count == place:
                raise KeyboardInterrupt
        return local

    def begin(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(files):
            return None
        frame.f_trace_opcodes = True
        return local

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # CPython 3.12 reports opcodes only if a frame wants them before settrace
    sys.settrace(begin)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False

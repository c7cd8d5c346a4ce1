"""Turns any exception that other libraries raise for a checkpoint's files into a typed error.

mlx-lm, transformers and tokenizers don't say which exceptions a file can cause, and tokenizers raises bare
``Exception`` and its own panics. A list of exception types at each call would always be incomplete.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from ..errors import FlashMoEError
from .safetensors_header import brief

_PACKAGE = __name__.partition(".")[0]
_PANIC = "PanicException"  # pyo3's, for a panic in Rust: a BaseException, with no module to import it from


class ForeignCode(AbstractContextManager[None]):
    """Context manager that turns exceptions raised by another library into a typed error.

    Interrupts, our own typed errors and exceptions raised by this package's own lines pass: the last are bugs, and
    must not be blamed on a file.

    Args:
        typed: Function that returns the error to raise from the original.
    """

    def __init__(self, typed: Callable[[BaseException], FlashMoEError]):
        self._typed = typed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, FlashMoEError):
            return
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            return
        if _is_our_own(traceback):
            return
        raise self._typed(error) from error


def say(error: BaseException) -> str:
    """Return an exception's type and the first line of its text, for use in a message."""
    lines = str(error).splitlines() if not isinstance(error, RecursionError) else ["nested too deeply"]
    return f"{type(error).__name__}: {brief(Exception(lines[0].rstrip('.')), 300)}" if lines else type(error).__name__


def _is_our_own(traceback: TracebackType | None) -> bool:
    """Return whether the error was raised by this package's own code, called by another library."""
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    # A single frame is the block itself, which called into a library not written in Python.
    return len(frames) > 1 and str(frames[-1].f_globals.get("__name__")).partition(".")[0] == _PACKAGE

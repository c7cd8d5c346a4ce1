"""Logging to stderr, with control characters replaced and repeated messages limited."""

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

from ..progress import report
from .printable import printable

BURST = 5
"""Maximum number of warnings from one line of code per `PERIOD_SECONDS`; clients can trigger any number."""

PERIOD_SECONDS = 60.0
MAX_CHARACTERS = 16_000  # per log record: a deep traceback


class PrintableFormatter(logging.Formatter):
    """A formatter that replaces control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a log record as one or more lines."""
        text = printable(super().format(record))
        return (
            text
            if len(text) <= MAX_CHARACTERS
            else f"{text[: MAX_CHARACTERS // 2]}\n...\n{text[-MAX_CHARACTERS // 2 :]}"
        )


class RepeatFilter(logging.Filter):
    """A filter that drops warnings and errors repeated by one line of code; the next one shown says how many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, int], tuple[float, int, int]] = {}  # period's start, shown, dropped

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show a log record."""
        if record.levelno < logging.WARNING:
            return True
        place, now = (record.pathname, record.lineno), self._clock()
        began, shown, left_out = self._seen.get(place, (now, 0, 0))
        if now - began >= PERIOD_SECONDS:
            began, shown = now, 0
        if shown >= BURST:
            self._seen[place] = (began, shown, left_out + 1)
            return False
        self._seen[place] = (began, shown + 1, 0)
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} more of these were left out)"
            record.args = ()
        return True


class OwnLineHandler(logging.StreamHandler[TextIO]):
    """A handler that takes a status line away before it writes, so that a record begins on a line of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log record."""
        report("")
        super().emit(record)


def log_to_stderr() -> None:
    """Log to standard error, unless the host program has configured logging already."""
    handler = OwnLineHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    handler.addFilter(RepeatFilter())
    logging.basicConfig(handlers=[handler])

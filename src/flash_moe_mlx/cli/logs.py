"""Log lines on stderr: clean of what terminals obey, and no more of them than somebody can read."""

import logging
import sys
import time
from collections.abc import Callable

from .printable import printable

BURST = 5
"""Warnings and errors of one place in the code within `PERIOD_SECONDS`; clients can cause as many as they like."""

PERIOD_SECONDS = 60.0
MAX_CHARACTERS = 16_000  # of one record: a deep traceback


class PrintableFormatter(logging.Formatter):
    """Names and messages, with control characters replaced."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or lines, of a record."""
        text = printable(super().format(record))
        return (
            text
            if len(text) <= MAX_CHARACTERS
            else f"{text[: MAX_CHARACTERS // 2]}\n...\n{text[-MAX_CHARACTERS // 2 :]}"
        )


class RepeatFilter(logging.Filter):
    """Leaves out warnings and errors that one place in the code repeats; the next that is shown says how many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, int], tuple[float, int, int]] = {}  # beginning of the period, shown, left out

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show a record."""
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


def log_to_stderr() -> None:
    """Show log records on standard error, unless the program that we run in has its own way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    handler.addFilter(RepeatFilter())
    logging.basicConfig(handlers=[handler])

"""Progress of long work, reported where it happens and drawn on a terminal or in a notebook.

Code that does the work calls `report`, which costs nothing while nobody watches. Code that users call opens `showing`,
which draws on a terminal (rich) or in a notebook (tqdm), passes steps to a caller's function, or does nothing. Watchers
nest: the innermost one gets the steps, and `showing(True)` leaves them to a watcher that is there already.
"""

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from .stats import format_bytes


@dataclass(frozen=True)
class Progress:
    """Progress of long work at one moment.

    Attributes:
        step: Current step, such as "compiling CPU kernels". Empty when the work is over.
        done: How much of the step, or of the whole work, is done.
        total: How much there is; 0 if unknown.
        unit: What ``done`` and ``total`` count: "bytes" or "tokens".
    """

    step: str
    done: int = 0
    total: int = 0
    unit: Literal["bytes", "tokens"] = "bytes"

    def __str__(self) -> str:
        """Return one line, such as "reading the prompt, 512 of 2,048 tokens"."""
        if not self.total:
            return self.step
        if self.unit == "tokens":
            return f"{self.step}, {self.done:,} of {self.total:,} tokens"
        return f"{self.step}, {format_bytes(self.done)} of {format_bytes(self.total)}"


REDRAW_SECONDS = 0.1
"""Least time between two drawings of a notebook's bar."""

Report = Callable[[Progress], None]

_watcher: ContextVar[Report | None] = ContextVar("flash_moe_mlx_progress", default=None)


def is_watched() -> bool:
    """Return whether somebody receives what `report` is given."""
    return _watcher.get() is not None


def report(step: str, done: int = 0, total: int = 0, unit: Literal["bytes", "tokens"] = "bytes") -> None:
    """Tell the innermost watcher of this thread, if any, what is going on."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(Progress(step, done, total, unit))


@contextmanager
def watching(watcher: Report | None) -> Iterator[None]:
    """Send what is reported within the context to a function, or to nobody."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def showing(progress: bool | Report) -> Iterator[None]:
    """Show what is reported within the context.

    Args:
        progress: A function that takes a `Progress`; True for one line on a terminal or in a notebook, and nothing
            elsewhere; False for nothing.
    """
    if callable(progress):
        with watching(progress):
            yield
    elif not progress or is_watched():
        yield
    elif in_notebook():
        with _notebook_line() as draw, watching(draw):
            yield
    elif sys.stderr.isatty():
        line = StatusLine()
        with line, watching(line.show):
            yield
    else:
        yield


def in_notebook() -> bool:
    """Return whether this process is a notebook's kernel."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def import_tqdm() -> None:
    """Import tqdm in a notebook, without its red warning where ipywidgets is not installed: bars are text then.

    Whoever imports it later, such as huggingface_hub, gets the same bars and no warning either.
    """
    if in_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tqdm.auto  # noqa: F401


class StatusLine:
    """One line on a terminal's stderr, with a spinner, that goes away. A context manager.

    It appears once the work has lasted for `DELAY_SECONDS`, so that quick work stays silent.
    """

    DELAY_SECONDS = 0.3

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._status: Any = None
        self._spinner: Any = None
        self._text = ""

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.clear()

    def show(self, moment: Progress) -> None:
        """Draw a moment in place of the one before; one without a step takes the line away."""
        text = printable_step(str(moment))
        if not moment.step:
            self.clear()
            return
        with self._lock:
            changed, self._text = text != self._text, text
            if self._status is not None:
                if changed:
                    self._spinner.update(text=_plain(text))
            elif self._timer is None:
                self._timer = threading.Timer(self.DELAY_SECONDS, self._appear)
                self._timer.daemon = True
                self._timer.start()

    def clear(self) -> None:
        """Take the line away, such as before text is printed."""
        with self._lock:
            timer, self._timer = self._timer, None
            status, self._status = self._status, None
            if timer is not None:
                timer.cancel()
            if status is not None:
                status.stop()

    def _appear(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        with self._lock:
            if self._timer is not None:  # not cleared meanwhile
                self._spinner = Spinner("dots", _plain(self._text), style="cyan")
                # Standard output stays itself: what is created meanwhile, such as a line editor, keeps it.
                self._status = Live(
                    self._spinner,
                    console=Console(stderr=True),
                    refresh_per_second=12.5,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self._status.start()


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text, overflow="ellipsis", no_wrap=True)


@contextmanager
def _notebook_line() -> Iterator[Report]:
    import_tqdm()
    from tqdm.auto import tqdm

    bar: Any = None
    name, drawn = "", 0.0

    def draw(moment: Progress) -> None:
        nonlocal bar, name, drawn
        if bar is not None and moment.step != name:
            bar.close()
            bar = None
        if moment.step:
            if bar is None:
                name = moment.step
                scaled = moment.unit == "bytes" and moment.total > 0
                unit = "B" if scaled else " tokens"
                plain = None if moment.total else "{desc} [{elapsed}]"
                bar = tqdm(desc=name, total=moment.total or None, unit=unit, unit_scale=scaled, leave=False,
                           bar_format=plain)  # fmt: skip
            elif time.monotonic() - drawn < REDRAW_SECONDS:  # each drawing is a message to the browser
                return
            drawn = time.monotonic()
            bar.n = moment.done
            bar.refresh()

    try:
        yield draw
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def reporting(progress: bool | Report, title: str) -> Iterator[Report]:
    """Yield the function to report to: the caller's, one that draws a bar if stderr is a terminal, or a no-op."""
    if callable(progress):
        yield progress
    elif progress and sys.stderr.isatty():
        with _bar(title) as draw:
            yield draw
    else:
        yield lambda moment: None


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, visible=False)  # until there is something to do
        started = False

        def draw(moment: Progress) -> None:
            # Work done by an earlier run fills the bar, but counts neither in the rate nor in the remaining time.
            nonlocal started
            if not started:
                started = True
                bar.reset(task, total=moment.total, completed=moment.done, visible=True)
            bar.update(
                task,
                description=escape(f"{title}: {printable_step(moment.step)}" if moment.step else title),
                completed=moment.done,
                total=moment.total,
            )

        yield draw


def printable_step(step: str) -> str:
    """Return a step without terminal control characters; it may contain a file name from an untrusted index."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in step)

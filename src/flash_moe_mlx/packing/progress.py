"""Progress reports of a packing or check: a bar on a terminal, or the caller's function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a packing or a check at one moment.

    Attributes:
        step: Current step, such as "download model-00003-of-00094.safetensors".
        done_bytes: Bytes of the result that are done.
        total_bytes: Total bytes of the result.
    """

    step: str
    done_bytes: int
    total_bytes: int


Report = Callable[[Progress], None]


@contextmanager
def reporting(progress: bool | Report, title: str) -> Iterator[Report]:
    """Yield the function to report to: the caller's, one that draws a bar if stderr is a terminal, or a no-op."""
    if callable(progress):
        yield progress
    elif progress and sys.stderr.isatty():
        with _bar(title) as report:
            yield report
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
        task = bar.add_task(title, total=None)
        start: int | None = None

        def report(moment: Progress) -> None:
            # Work done by an earlier run counts neither in the rate nor in the remaining time.
            nonlocal start
            start = moment.done_bytes if start is None else start
            bar.update(
                task,
                description=escape(f"{title}: {_shown(moment.step)}" if moment.step else title),
                completed=moment.done_bytes - start,
                total=moment.total_bytes - start,
            )

        yield report


def _shown(step: str) -> str:
    """Return a step without terminal control characters; it may contain a file name from an untrusted index."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in step)

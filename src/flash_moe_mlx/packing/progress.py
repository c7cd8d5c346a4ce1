"""What a packing says of itself while it runs: a bar on a terminal, or a function of the caller's."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A moment of a packing or a check.

    Attributes:
        step: What is being done, such as "download model-00003-of-00094.safetensors".
        done_bytes: Of the result.
        total_bytes: Of the result.
    """

    step: str
    done_bytes: int
    total_bytes: int


Report = Callable[[Progress], None]


@contextmanager
def reporting(progress: bool | Report, title: str) -> Iterator[Report]:
    """The function to report to: the caller's own, a bar on stderr if that is a terminal, or nothing."""
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
            # What an earlier run has done counts neither in the rate nor in the time left.
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
    """Return a step, which may hold a file's name out of an index, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in step)

"""Tables and paragraphs on a terminal or in a pipe, laid out by rich."""

import sys
from collections.abc import Iterable, Sequence
from shutil import get_terminal_size
from typing import Any

import typer

from ..progress import report
from .printable import printable

WIDE = 1000  # columns of a pipe: nothing is wrapped or cut


def columns() -> int:
    """Return the width of the terminal, or `WIDE` in a pipe."""
    return get_terminal_size().columns if sys.stdout.isatty() else WIDE


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[str] = ()) -> None:
    """Print rows under a head: on a terminal in its width, with a rule; in a pipe one line per row.

    Args:
        head: Names of the columns.
        rows: Cells by row.
        right: Columns to align to the right.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, show_edge=False, header_style="bold"
    )
    for name in head:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    _print(table)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print names, and to their right the values, whose further lines are indented."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    _print(table)


def print_paragraphs(paragraphs: Iterable[str]) -> None:
    """Print each paragraph on lines of its own, wrapped between words on a terminal."""
    for paragraph in paragraphs:
        _print(printable(paragraph))


def _print(renderable: Any) -> None:
    from io import StringIO

    from rich.console import Console

    report("")  # a status line would run into the table
    text = StringIO()
    console = Console(
        file=text, width=columns(), force_terminal=sys.stdout.isatty(), highlight=False, markup=False, emoji=False
    )
    console.print(renderable)
    typer.echo("\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n")))

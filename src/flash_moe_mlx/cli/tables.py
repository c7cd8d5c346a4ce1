"""Tables on a terminal or in a pipe."""

import sys
from collections.abc import Sequence
from shutil import get_terminal_size

from .printable import echo, printable

WIDE = 1000  # columns of a pipe: nothing is wrapped or cut


def columns() -> int:
    """Return the width of the terminal, or `WIDE` in a pipe."""
    return get_terminal_size().columns if sys.stdout.isatty() else WIDE


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows under a head, in as many columns as the terminal has.

    Args:
        head: Names of the columns.
        rows: Cells by row.
        right: Columns to align to the right.
    """
    from io import StringIO

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    text = StringIO()
    Console(file=text, width=columns(), highlight=False, markup=False).print(table)
    echo("\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").splitlines()))

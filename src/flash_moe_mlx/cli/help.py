"""The help of commands: options in panels by subject, as boxes on a terminal and as plain sections in a pipe.

An option's panel is its ``rich_help_panel``, which typer keeps; a command's is given to ``options.add_command``.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from shutil import get_terminal_size
from typing import Any, TypeAlias

from typer.core import TyperCommand, TyperGroup

MAX_COLUMNS = 100
NAME_COLUMNS = 30  # of a name and its type; longer ones have a line of their own

Rows: TypeAlias = list[tuple[str, str]]


class PanelCommand(TyperCommand):
    """A command whose help has panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_sections(_options(self, ctx), formatter)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if sys.stdout.isatty():
            formatter.write(_boxes(self, ctx, _options(self, ctx)))
        else:
            super().format_help(ctx, formatter)


class PanelGroup(TyperGroup):
    """A group of commands whose help has panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_sections([*_commands(self, ctx), *_options(self, ctx)], formatter)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if sys.stdout.isatty():
            formatter.write(_boxes(self, ctx, [*_commands(self, ctx), *_options(self, ctx)]))
        else:
            super().format_help(ctx, formatter)


def _options(command: Any, ctx: Any) -> Iterator[tuple[str, Rows]]:
    """Yield the panels of arguments and options: those of the command itself come first."""
    panels: dict[str, Rows] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is None:  # hidden
            continue
        usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panel = getattr(parameter, "rich_help_panel", None) or usual
        panels.setdefault(panel, []).append((_name(parameter, record[0]), record[1]))
    yield from ((name, rows) for name, rows in panels.items() if rows)


def _name(parameter: Any, record: str) -> str:
    """Return an option's names and the type of one value, without mlx-lm's names for it."""
    for alias in [name for name in parameter.opts if name.startswith("--")][1:]:
        record = record.replace(f", {alias}", "")
    record = re.sub(r"<list\[(\w+)\]>", lambda found: f"<{found[1].lower()}>", record)
    return record.replace(" range>", ">")


def _commands(group: Any, ctx: Any) -> Iterator[tuple[str, Rows]]:
    """Yield the panels of a group's commands, each with the first paragraph of its help."""
    panels: dict[str, Rows] = {}
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        summary = " ".join((command.help or "").partition("\n\n")[0].split())
        panels.setdefault(command.rich_help_panel or "Commands", []).append((name, summary))
    yield from panels.items()


def _write_sections(sections: Iterable[tuple[str, Rows]], formatter: Any) -> None:
    for title, rows in sections:
        with formatter.section(title):
            formatter.write_dl(rows, col_max=NAME_COLUMNS)


def _boxes(command: Any, ctx: Any, sections: Iterable[tuple[str, Rows]]) -> str:
    """Return the whole help for a terminal, with its styles as escape codes."""
    from io import StringIO

    from rich.box import ROUNDED
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    text = StringIO()
    width = min(get_terminal_size().columns, MAX_COLUMNS)
    console = Console(file=text, width=width, force_terminal=True, highlight=False, markup=False)
    console.print(Text.assemble(("Usage: ", "bold"), command.get_usage(ctx).removeprefix("Usage: ")), end="\n\n")
    for paragraph in (command.help or "").split("\n\n"):
        console.print(" ".join(paragraph.split()), end="\n\n")
    for title, rows in sections:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="bold cyan", max_width=NAME_COLUMNS, overflow="fold")
        table.add_column(ratio=1)
        for name, meaning in rows:
            shown = Text(name)
            shown.highlight_regex(r"<.*>", "not bold yellow")
            table.add_row(shown, _faint_extras(meaning))
        console.print(Panel(table, title=title, title_align="left", box=ROUNDED, border_style="dim"))
    examples = (command.epilog or "").partition("Examples:\n")[2]
    if examples:
        console.print(Text("\nExamples:", "bold"))
        console.print(Text(examples), soft_wrap=True)  # unbroken lines can be copied
    return text.getvalue()


def _faint_extras(meaning: str) -> Any:
    """Return a meaning with its default and range, in brackets at the end, dimmed."""
    from rich.text import Text

    shown = Text(meaning)
    if found := re.search(r"\[[^\]]*\]$", meaning):
        shown.stylize("dim", found.start())
    return shown

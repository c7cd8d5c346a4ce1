"""Streamed Markdown: which blocks are finished, and a region of the screen that is redrawn."""

import math

import rich.markdown
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, escape
from rich.cells import cell_len
from rich.console import Console, RenderableType

_MATHS = (r"\(", r"\)", r"\[", r"\]")


def _escape_all_but_maths(state: StateInline, silent: bool) -> bool:
    return state.src[state.pos : state.pos + 2] not in _MATHS and escape(state, silent)


# As rich.markdown parses, but tags are text, which rich leaves out, and TeX's brackets keep their backslashes.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
_PARSER.inline.ruler.at("escape", _escape_all_but_maths)


class Markdown(rich.markdown.Markdown):
    """Markdown as models write it: HTML tags and the brackets of TeX's formulas are shown as they stand."""

    def __init__(self, text: str):
        super().__init__(text)
        self.parsed = _PARSER.parse(text)


def finished(text: str) -> int:
    """Return the length of the prefix of ``text`` made of whole Markdown blocks, which later text can't change."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    if not starts:
        return 0
    lines = text.splitlines(keepends=True)
    return sum(map(len, lines[: starts[-1]]))


class Region:
    """The last lines of the screen, drawn anew at each change. Stays right when the terminal becomes narrower."""

    def __init__(self, console: Console):
        self._console = console
        self._widths: list[int] = []  # in cells, of the lines that are drawn
        self._is_open = False

    def draw(self, renderable: RenderableType) -> None:
        """Draw as many of the last lines as fit the terminal, in place of those before."""
        if not self._is_open:
            self._is_open = True
            self._console.show_cursor(False)
        lines = self._console.render_lines(renderable, pad=False)[-max(1, self._console.height - 2) :]
        self._erase()
        for line in lines:
            for segment in line:
                self._console.print(
                    segment.text, style=segment.style, end="", markup=False, highlight=False, soft_wrap=True
                )
            self._console.print()
        self._widths = [cell_len("".join(segment.text for segment in line)) for line in lines]

    def clear(self) -> None:
        """Erase what is drawn."""
        self._erase()

    def close(self) -> None:
        """Erase what is drawn, and show the cursor again."""
        self._erase()
        if self._is_open:
            self._is_open = False
            self._console.show_cursor(True)

    def _erase(self) -> None:
        if self._widths:
            # A terminal that has become narrower has wrapped the lines.
            width = max(self._console.width, 1)
            rows = sum(max(1, math.ceil(cells / width)) for cells in self._widths)
            rows = min(rows, self._console.height - 1)
            # Line by line: tmux keeps a screen that is cleared at once, and shows it in its history.
            self._console.file.write("\r" + "\x1b[1A\x1b[2K" * rows)
            self._widths = []

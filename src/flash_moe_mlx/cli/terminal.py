"""Terminal input and output of a chat: line editing with history, and streamed Markdown."""

import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.text import Text

from ..progress import Progress
from .markdown import Markdown, Region, finished
from .printable import printable

REFRESH_SECONDS = 0.1

Thinking = Literal["show", "hide", "off"]
Reader = Callable[[str], str]
"""A function that prompts for and reads one message. Raises EOFError at end of input, KeyboardInterrupt on Ctrl-C."""


def read_line(prompt: str) -> str:
    """Read a line from standard input, without editing. The prompt is shown only on a terminal."""
    if sys.stdin.isatty():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def editing_reader(history: Path, words: Sequence[str], toolbar: Callable[[], str] = str) -> Reader:
    """Return a multi-line reader with history: Enter sends, Alt-Enter or Ctrl-J starts a new line.

    Args:
        history: History file; created if missing.
        words: Words that Tab completes.
        toolbar: Function that returns the line below the prompt; empty for none.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        bottom_toolbar=lambda: toolbar() or None,
    )
    return session.prompt


class AnswerView:
    """A live view of an answer being generated. A context manager that restores the terminal on exit.

    On a terminal, finished blocks are printed once and the unfinished one is redrawn. Otherwise text is written as
    it arrives.
    """

    def __init__(self, console: Console, thinking: Thinking):
        self._console = console
        self._thinking = thinking
        self._kind = "text"
        self._block = ""
        self._thought = 0
        self._drawn = 0.0
        self._region = Region(console)
        self._is_drawing = False
        self._echo = _Echo()

    def __enter__(self) -> "AnswerView":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()

    def write(self, kind: str, text: str) -> None:
        """Show a piece of the answer, of kind "thinking" or "text"."""
        if not self._console.is_terminal:
            if kind == "text":
                self._console.file.write(text)
                self._console.file.flush()
            return
        if kind != self._kind:
            self.finish()
            self._kind = kind
        self._block += printable(text)
        if kind == "thinking" and self._thinking != "show":
            self._thought += 1
            self._draw(Text(f"thinking, {self._thought} tokens", style="dim"))
            return
        done = finished(self._block) if self._kind == "text" and "\n" in text else 0
        if done:
            self._print(self._block[:done])
            self._block = self._block[done:]
        self._draw(self._render(self._block))

    def step(self, moment: Progress) -> None:
        """Show what the answer waits for, such as how many prompt tokens have been processed."""
        if self._console.is_terminal and moment.step and not self._block:
            self._draw(Text(printable(str(moment)), style="dim"))

    def finish(self) -> None:
        """Print the rest of the answer and release the terminal."""
        if self._is_drawing:
            self._is_drawing = False
            self._region.close()
            self._echo.restore()
        block, self._block = self._block, ""
        if self._kind == "text" or self._thinking == "show":
            self._print(block)

    def _print(self, block: str) -> None:
        if block.strip():
            self._region.clear()
            self._console.print(self._render(block.rstrip("\n")))
            if self._kind == "thinking":
                self._console.print()

    def _render(self, block: str) -> RenderableType:
        return Text(block, style="dim italic") if self._kind == "thinking" else Markdown(block)

    def _draw(self, renderable: RenderableType) -> None:
        now = time.monotonic()
        if now - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = now
        if not self._is_drawing:
            self._is_drawing = True
            self._echo.silence()
        self._region.draw(renderable)


class _Echo:
    """Turns off terminal echo while an answer is drawn, so that keys such as ^C don't appear in it."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def silence(self) -> None:
        if sys.stdin.isatty():
            self._before = termios.tcgetattr(sys.stdin)
            flags = [*self._before]
            flags[3] &= ~termios.ECHO
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, flags)

    def restore(self) -> None:
        if self._before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)
            self._before = None

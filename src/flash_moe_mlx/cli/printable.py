"""Makes text from models, files and clients safe for terminals and logs."""

import json
import sys
import unicodedata
from io import TextIOWrapper

import typer

from ..progress import report

_SHOWN = frozenset("\n\t\u200c\u200d")  # Persian, Indic scripts and emoji join with the last two


def printable(text: str) -> str:
    """Return the text without characters that move the cursor or that hide or reorder their neighbours."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_shown(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def echo(text: object = "", *, nl: bool = True, err: bool = False) -> None:
    """Print untrusted text: file names, paths, error messages."""
    report("")  # a status line would run into the text
    typer.echo(printable(str(text)), nl=nl, err=err)


def escaped(document: str) -> str:
    """Return an equivalent JSON document with terminal control characters escaped."""
    return "".join(c if _is_shown(c) else json.dumps(c)[1:-1] for c in document)


def make_streams_total() -> None:
    """Let standard output accept any character and standard input accept any byte.

    A character that the terminal's encoding lacks is shown as ``?``. A byte that is not UTF-8 becomes a lone
    surrogate, as in command-line arguments; prompts refuse those.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in _SHOWN or unicodedata.category(character) == "Zs"

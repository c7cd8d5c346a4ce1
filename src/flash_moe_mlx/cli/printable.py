"""Text of a model, a file or a client, made safe for a terminal and for logs."""

import json
import sys
import unicodedata
from io import TextIOWrapper

import typer

_SHOWN = frozenset("\n\t\u200c\u200d")  # Persian, Indic scripts and emoji join with the last two


def printable(text: str) -> str:
    """Return the text without characters that move the cursor, hide or turn round what stands next to them."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_shown(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def echo(text: object = "", *, nl: bool = True, err: bool = False) -> None:
    """Print text that may hold anything: names out of files, paths, messages of errors."""
    typer.echo(printable(str(text)), nl=nl, err=err)


def escaped(document: str) -> str:
    """Return a JSON document with escapes in place of what a terminal would obey: the same values."""
    return "".join(c if _is_shown(c) else json.dumps(c)[1:-1] for c in document)


def make_streams_total() -> None:
    """Let standard output take any character, and standard input give any byte.

    A character that the terminal's encoding lacks is shown as ``?``. A byte that is no UTF-8 becomes half of a
    surrogate pair, as in arguments of the command line, which prompts refuse.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in _SHOWN or unicodedata.category(character) == "Zs"

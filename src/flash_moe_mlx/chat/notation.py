"""Notations of a call's arguments, which can be read while they are written: JSON's, and texts between markers."""

import json
import re
from dataclasses import dataclass
from typing import Any, Protocol

from .calls import Call, NotACallError, mend_pairs

_SPACE = re.compile(r"\s*")
_STRING = re.compile(r'(?:[^"\\]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_FIRST_HALF = re.compile(r"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2})\Z")
_SCALAR = re.compile(r"[-+.\w]*\Z")


class UnfinishedError(Exception):
    """A call isn't complete in the text so far.

    Attributes:
        in_string: Whether it ends inside a JSON string, so that no marker in the text that follows ends the call.
    """

    def __init__(self, *, in_string: bool = False):
        super().__init__()
        self.in_string = in_string


class Notation(Protocol):
    """One way to write arguments.

    Its methods take a text and a position. They raise UnfinishedError until it is certain what is there, and
    NotACallError where nothing that follows makes it a call.
    """

    written: bool
    """Whether every value is a text, whose type is the schema's."""

    def key(self, text: str, position: int) -> tuple[str | None, int]:
        """Return the next name, or None at the end, and where it ends."""

    def opening(self, text: str, position: int) -> tuple[str, int]:
        """Return the sign of a text (``"``), an object or a list, or nothing for other values, and where it ends."""

    def text_end(self, text: str, position: int) -> tuple[int, int | None]:
        """Return how far a text is certain, and where its closing sign ends if it is known to be there."""

    def decoded(self, raw: str) -> str:
        """Return what a part of a text says."""

    def value(self, text: str, position: int) -> tuple[Any, int]:
        """Return a whole value and where it ends."""


@dataclass(frozen=True)
class Head:
    """The beginning of a call, up to its arguments.

    Attributes:
        call: The call, without arguments.
        position: Where the first name may begin.
        notation: How the arguments are written.
    """

    call: Call
    position: int
    notation: Notation


def skip_space(text: str, position: int) -> int:
    """Return where the white space at a position ends."""
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


def sign_at(text: str, position: int) -> int:
    """Return where the next character is that is no white space; raises UnfinishedError where there is none."""
    if (position := skip_space(text, position)) == len(text):
        raise UnfinishedError
    return position


def next_item(text: str, position: int, end: str) -> tuple[bool, int]:
    """Return whether an item follows rather than the end, and where; raises UnfinishedError."""
    position = sign_at(text, position)
    if text[position] == ",":
        position = sign_at(text, position + 1)
    return (False, position + 1) if text[position] == end else (True, position)


def partly(text: str, mark: str, position: int) -> int:
    """Return where the first mark, or at the text's end the beginning of one, may be; the text's end without any."""
    if (found := text.find(mark, position)) >= 0:
        return found
    sizes = range(min(len(mark) - 1, len(text) - position), 0, -1)
    return len(text) - next((size for size in sizes if text.endswith(mark[:size])), 0)


def json_at(text: str, position: int) -> tuple[Any, int]:
    """Read a JSON value; returns it and where it ends.

    Raises:
        UnfinishedError: If the text ends inside it.
        NotACallError: If it is none.
    """
    try:
        return _DECODER.raw_decode(mend_pairs(text), position)
    except json.JSONDecodeError as error:
        in_string = error.msg.startswith("Unterminated string")
        if in_string or _SCALAR.match(text, error.pos):  # a value, or an escape, whose end is to come
            raise UnfinishedError(in_string=in_string or error.msg.startswith("Invalid \\u")) from error
        raise NotACallError(f"arguments must be JSON, got {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise NotACallError(f"arguments must be JSON, got {error}") from error


def _refuse(constant: str) -> Any:
    raise NotACallError(f"arguments must be JSON, got {constant}")


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Keep the first of values with the same name: streams have sent it when the others come."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        members.setdefault(name, value)
    return members


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse, object_pairs_hook=_first_of_each)


class JsonNotation:
    """Arguments as a JSON object."""

    written = False

    def key(self, text: str, position: int) -> tuple[str | None, int]:
        """Return the next name."""
        more, position = next_item(text, position, "}")
        if not more:
            return None, position
        if text[position] != '"':
            raise NotACallError("a name must be quoted")
        key, position = self.value(text, position)
        if text[position := sign_at(text, position)] != ":":
            raise NotACallError("a value must follow a name")
        return key, sign_at(text, position + 1)

    def opening(self, text: str, position: int) -> tuple[str, int]:
        """Return the sign that a value begins with."""
        sign = text[position]
        return (sign, position + 1) if sign in '"{[' else ("", position)

    def text_end(self, text: str, position: int) -> tuple[int, int | None]:
        """Return how far a string is certain: the first half of a pair waits for what follows."""
        match = _STRING.match(text, position)
        end = position if match is None else match.end()
        if text.startswith('"', end):
            return end, end + 1
        half = _FIRST_HALF.search(text[position:end])
        return (position + half.start(1) if half else end), None

    def decoded(self, raw: str) -> str:
        """Return what a part of a string says."""
        return str(json.loads(f'"{mend_pairs(raw)}"', strict=False))

    def value(self, text: str, position: int) -> tuple[Any, int]:
        """Return a whole value."""
        if _SCALAR.match(text, position):  # more of it may follow
            raise UnfinishedError
        return json_at(text, position)


def json_head(call: Call, text: str, position: int) -> Head | None:
    """Return the head of a call whose arguments are JSON, if an object begins at a position."""
    return Head(call, position + 1, JsonNotation()) if text.startswith("{", position) else None


@dataclass(frozen=True)
class WrittenNotation:
    """Arguments as texts between markers.

    Attributes:
        begin: The beginning of an argument; its group is the name.
        end: The end of one.
        follows: Beginnings of what must follow the end of one, white space aside.
        ending: The end of one with all that must follow it.
        lines: Whether line ends after the beginning of a value and before its end are not part of it.
    """

    begin: "re.Pattern[str]"
    end: str
    follows: tuple[str, ...]
    ending: "re.Pattern[str]"
    lines: bool
    written = True

    def key(self, text: str, position: int) -> tuple[str | None, int]:
        """Return the next name."""
        if (begin := self.begin.match(text, skip_space(text, position))) is None:
            raise UnfinishedError
        return begin.group(1).strip(), begin.end()

    def opening(self, text: str, position: int) -> tuple[str, int]:
        """Return where the text begins."""
        if not self.lines:
            return '"', position
        if position == len(text):
            raise UnfinishedError
        return '"', position + text.startswith("\n", position)

    def text_end(self, text: str, position: int) -> tuple[int, int | None]:
        """Return how far a text is certain: as far as its end can't have begun."""
        found = partly(text, self.end, position)
        ending = None
        while text.startswith(self.end, found) and (ending := self.ending.match(text, found)) is None:
            following = skip_space(text, found + len(self.end))
            if any(mark.startswith(text[following : following + len(mark)]) for mark in self.follows):
                break
            found = partly(text, self.end, found + len(self.end))
        certain = found - (self.lines and found > position and text[found - 1] == "\n")
        return certain, None if ending is None else ending.end()

    def decoded(self, raw: str) -> str:
        """Return the text as it stands."""
        return raw

    def value(self, text: str, position: int) -> tuple[Any, int]:
        """Return a whole text."""
        start = self.opening(text, position)[1]
        end, after = self.text_end(text, start)
        if after is None:
            raise UnfinishedError
        return text[start:end], after

"""The arguments of a call while the model still writes it, as pieces of the JSON that the whole call will have.

A piece is given only when nothing that follows can change it: a text as far as its end can't have begun, any other
value when it is whole. Calls in JSON objects, in sections and in functions with parameters are followed; others come
whole.
"""

import json
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from .calls import Call, NotACallError, mend_pairs
from .coercion import keeps_text, parameters_of
from .syntax import FENCED, NUMBERED, CallSyntax, SectionSyntax, UnfinishedError, XmlSyntax, json_at, skip_space

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_LONGEST_HEAD = 1000
_STRING = re.compile(r'(?:[^"\\]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_FIRST_HALF = re.compile(r"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2})\Z")
_SCALAR = re.compile(r"[-+.\w]*\Z")


@dataclass(frozen=True)
class CallBegun:
    """The beginning of a call.

    Attributes:
        call: The call, without arguments.
    """

    call: Call


@dataclass(frozen=True)
class CallText:
    """More of the JSON of the arguments of the call that was begun."""

    text: str


_Steps = Generator[CallBegun | CallText | None, None, Any]  # None: more of the block is needed


class CallFollower:
    """Follows the first call of a block of calls, as the block grows.

    Attributes:
        begun: Whether the beginning of a call was given.
    """

    def __init__(self, syntax: CallSyntax):
        """Begin a block.

        Args:
            syntax: The syntax that reads the whole block at its end.
        """
        self.begun = False
        self._syntax = syntax
        self._names = syntax.names
        self._block = ""
        self._steps = self._follow()
        self._first = True

    def take(self, block: str) -> list[CallBegun | CallText]:
        """Return the pieces that are certain by now.

        Args:
            block: All that was said after the opening marker.
        """
        self._block = block
        pieces: list[CallBegun | CallText] = []
        try:
            while (piece := next(self._steps, None)) is not None:
                pieces.append(piece)
        except NotACallError:  # the end of the block tells; after it the steps are over
            pass
        self.begun = self.begun or bool(pieces)
        return pieces

    def _follow(self) -> _Steps:
        while (head := self._head()) is None:
            if len(self._block) > _LONGEST_HEAD:
                return
            yield None
        call, position = head
        if call.name not in self._names:
            return
        yield CallBegun(call)
        if position < 0:
            yield from self._parameters(call.name, -position)
        else:
            yield from self._members(call.name, position)

    def _head(self) -> tuple[Call, int] | None:
        """Return the call without arguments, and where its JSON begins, or, negative, its parameters."""
        syntax, block = self._syntax, self._block
        if isinstance(syntax, SectionSyntax):
            return _section_head(syntax, block)
        if not isinstance(syntax, XmlSyntax):
            return None
        if objects := _HEAD.match(block):
            return syntax.call(json.loads(objects.group(1), strict=False), {}), objects.end()
        function = syntax.form.function.match(block, skip_space(block, 0))
        return function and (syntax.written_call(function.group(1), {}), -function.end())

    # JSON.

    def _members(self, name: str, position: int) -> _Steps:
        known: set[str] = set()
        position += 1
        while True:
            position = yield from self._sign(position)
            if self._block[position] != '"':
                return
            key, position = yield from self._value(position)
            position = yield from self._sign(position)
            if self._block[position] != ":":
                return
            position = yield from self._sign(position + 1)
            if key not in known and self._block[position] == '"' and self._keeps_text(name, key, written=False):
                position = yield from self._string(name, key, position + 1)
            else:
                value, position = yield from self._value(position)
                if key not in known:
                    yield self._member(self._syntax.call(name, {key: value}).arguments)
            known.add(key)
            position = yield from self._sign(position)
            if self._block[position] != ",":
                return
            position += 1

    def _sign(self, position: int) -> Generator[None, None, int]:
        """Return where the next character that is no white space is."""
        while (position := skip_space(self._block, position)) == len(self._block):
            yield None
        return position

    def _value(self, position: int) -> Generator[None, None, tuple[Any, int]]:
        """Return a whole value and where it ends."""
        while True:
            if not _SCALAR.match(self._block, position):
                try:
                    return json_at(self._block, position)
                except (UnfinishedError, NotACallError):  # in the middle of a value nobody can tell
                    pass
            yield None

    def _string(self, name: str, key: str, position: int) -> Generator[CallText | None, None, int]:
        """Give a text as it grows; returns where it ends."""
        yield self._opening(name, key)
        while True:
            end = self._string_end(position)
            if end > position:
                text = json.loads(f'"{mend_pairs(self._block[position:end])}"', strict=False)
                yield self._text(name, key, text)
                position = end
            if self._block.startswith('"', position):
                yield CallText('"')
                return position + 1
            yield None

    def _string_end(self, position: int) -> int:
        """Return how far a text is certain: the first half of a pair waits for what follows."""
        match = _STRING.match(self._block, position)
        end = position if match is None else match.end()
        if not self._block.startswith('"', end) and (half := _FIRST_HALF.search(self._block[position:end])):
            return position + half.start(1)
        return end

    # Parameters.

    def _parameters(self, name: str, position: int) -> _Steps:
        assert isinstance(self._syntax, XmlSyntax)
        form, ending = self._syntax.form, self._syntax.certain_ending
        known: set[str] = set()
        while True:
            position = skip_space(self._block, position)
            if (parameter := form.parameter.match(self._block, position)) is None:
                yield None
                continue
            key, start = parameter.group(1), parameter.end()
            streams = key not in known and self._keeps_text(name, key, written=True)
            if streams:
                yield self._opening(name, key)
            given, held = 0, start
            while (end := ending.search(self._block, held)) is None:
                held = self._held(held)
                value = self._value_of(start, held)
                if streams and len(value) > given:
                    yield self._text(name, key, value[given:])
                    given = len(value)
                yield None
            value, position = self._value_of(start, end.start()), end.end()
            if streams:
                if len(value) > given:
                    yield self._text(name, key, value[given:])
                yield CallText('"')
            elif key not in known:
                yield self._member(self._syntax.written_call(name, {key: value}).arguments)
            known.add(key)

    def _value_of(self, start: int, end: int) -> str:
        assert isinstance(self._syntax, XmlSyntax)
        value = self._block[start:end]
        return value.removeprefix("\n") if self._syntax.form.lines else value

    def _held(self, position: int) -> int:
        """Return where the end of a parameter may begin, at or after a position."""
        assert isinstance(self._syntax, XmlSyntax)
        block, form = self._block, self._syntax.form
        if (found := block.find(form.parameter_end, position)) < 0:
            sizes = range(min(len(form.parameter_end) - 1, len(block) - position), 0, -1)
            size = next((size for size in sizes if block.endswith(form.parameter_end[:size])), 0)
            found = len(block) - size
        return found - 1 if form.lines and found > position and block[found - 1] == "\n" else found

    # Pieces.

    def _keeps_text(self, name: str, key: str, *, written: bool) -> bool:
        return keeps_text(self._key(name, key), parameters_of(self._syntax.tools, name), written=written)

    def _key(self, name: str, key: str) -> str:
        return next(iter(self._syntax.call(name, {key: ""}).arguments))

    def _opening(self, name: str, key: str) -> CallText:
        return CallText(self._member({self._key(name, key): ""}).text[:-1])

    def _text(self, name: str, key: str, text: str) -> CallText:
        (value,) = self._syntax.call(name, {key: text}).arguments.values()
        return CallText(json.dumps(value, ensure_ascii=False)[1:-1])

    def _member(self, arguments: Mapping[str, Any]) -> CallText:
        before, self._first = "{" if self._first else ", ", False
        return CallText(before + json.dumps(arguments, ensure_ascii=False)[1:-1])


def _section_head(syntax: SectionSyntax, block: str) -> tuple[Call, int] | None:
    begin, separator = syntax.symbols[syntax.begin], syntax.symbols[syntax.separator]
    position = skip_space(block, 0)
    if not block.startswith(begin, position) or (found := block.find(separator, position)) < 0:
        return None
    header = syntax.symbols.text(block[position + len(begin) : found]).strip()
    position = skip_space(block, found + len(separator))
    if fenced := FENCED.match(block, position):
        position = fenced.end()
    if not block.startswith("{", position):
        return None
    if fenced:
        return syntax.call(fenced.group(1), {}), position
    if numbered := NUMBERED.fullmatch(header):
        return syntax.call(numbered.group(1), {}, header), position
    return syntax.call(header, {}), position

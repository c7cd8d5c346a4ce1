"""The arguments of a call while the model still writes it, as pieces of the JSON that the whole call will have.

A piece is given only when nothing that follows can change it: a text as far as its end can't have begun, any other
value when it is whole. Objects and lists are followed into. Where calls and their arguments begin is the syntax's to
tell, and how arguments are written the notation's.
"""

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from .calls import MAX_DEPTH, Call, NotACallError
from .coercion import keeps_text, parameters_of
from .notation import Head, Notation, UnfinishedError, next_item
from .syntax import CallSyntax

_LONGEST_HEAD = 1000


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


_T = TypeVar("_T")
_Steps = Generator[CallBegun | CallText | None, None, _T]  # None: more of the block is needed


class CallFollower:
    """Follows the first call of a block of calls, as the block grows.

    Attributes:
        begun: Whether the beginning of a call was given.
    """

    def __init__(self, syntax: CallSyntax, head: Callable[[str], Head | None]):
        """Begin a block.

        Args:
            syntax: The syntax that reads the whole block at its end.
            head: Returns the head of the block's first call, or None until it is certain.
        """
        self.begun = False
        self._syntax = syntax
        self._head = head
        self._block = ""
        self._steps = self._follow()

    def take(self, block: str) -> list[CallBegun | CallText]:
        """Return the pieces that are certain by now.

        Args:
            block: All that was said of the block.
        """
        self._block = block
        pieces: list[CallBegun | CallText] = []
        text = ""
        try:
            while (piece := next(self._steps, None)) is not None:
                if isinstance(piece, CallText):
                    text += piece.text
                else:
                    pieces.append(piece)
        except NotACallError:  # the end of the block tells; after it the steps are over
            pass
        if text:
            pieces.append(CallText(text))
        self.begun = self.begun or bool(pieces)
        return pieces

    def _follow(self) -> _Steps[None]:
        while (head := self._head(self._block)) is None:
            if len(self._block) > _LONGEST_HEAD:
                return
            yield None
        if head.call.name in self._syntax.names:
            self._name = head.call.name
            yield from self._arguments(head)

    def _arguments(self, head: Head) -> _Steps[None]:
        """Give the arguments in the types of the schema; the call begins with the first."""
        notation, position, known = head.notation, head.position, set[str]()
        schema = parameters_of(self._syntax.tools, self._name)
        read: Callable[..., Call] = self._syntax.written_call if notation.written else self._syntax.call
        while True:
            key, position = yield from self._when_certain(notation.key, position)
            if key is None:
                return
            if key in known:  # the first of two values counts
                _, position = yield from self._when_certain(notation.value, position)
                continue
            if not known:
                yield CallBegun(head.call)
            before = ", " if known else "{"
            known.add(key)
            sign, _ = yield from self._when_certain(notation.opening, position)
            name = str(self._sent(key))
            if sign in ("{", "[") or (sign and keeps_text(name, schema, written=notation.written)):
                yield CallText(f"{before}{_json(name)}: ")
                position = yield from self._value(notation, position, 1)
            else:
                value, position = yield from self._when_certain(notation.value, position)
                yield CallText(before + _json(read(self._name, {key: value}).arguments)[1:-1])

    def _value(self, notation: Notation, position: int, depth: int) -> _Steps[int]:
        """Give a value, texts within it as they grow; returns where it ends."""
        sign, start = yield from self._when_certain(notation.opening, position)
        if depth > MAX_DEPTH:
            raise NotACallError(f"arguments must be nested at most {MAX_DEPTH} deep, got more")
        if sign == "{":
            return (yield from self._object(notation, start, depth))
        if sign == "[":
            return (yield from self._list(notation, start, depth))
        if sign:
            return (yield from self._text(notation, start))
        value, position = yield from self._when_certain(notation.value, position)
        yield CallText(_json(self._sent(value)))
        return position

    def _object(self, notation: Notation, position: int, depth: int) -> _Steps[int]:
        known = set[str]()
        yield CallText("{")
        while True:
            key, position = yield from self._when_certain(notation.key, position)
            if key is None:
                yield CallText("}")
                return position
            if key in known:
                _, position = yield from self._when_certain(notation.value, position)
                continue
            yield CallText(f"{', ' if known else ''}{_json(self._sent(key))}: ")
            known.add(key)
            position = yield from self._value(notation, position, depth + 1)

    def _list(self, notation: Notation, position: int, depth: int) -> _Steps[int]:
        before = ""
        yield CallText("[")
        while True:
            more, position = yield from self._when_certain(lambda text, at: next_item(text, at, "]"), position)
            if not more:
                yield CallText("]")
                return position
            yield CallText(before)
            before = ", "
            position = yield from self._value(notation, position, depth + 1)

    def _text(self, notation: Notation, position: int) -> _Steps[int]:
        yield CallText('"')
        while True:
            certain, end = notation.text_end(self._block, position)
            if certain > position:
                yield CallText(_json(self._sent(notation.decoded(self._block[position:certain])))[1:-1])
                position = certain
            if end is not None:
                yield CallText('"')
                return end
            yield None

    def _when_certain(self, read: Callable[[str, int], _T], position: int) -> Generator[None, None, _T]:
        """Return what is at a position as soon as that can be told."""
        while True:
            try:
                return read(self._block, position)
            except UnfinishedError:
                yield None

    def _sent(self, value: Any) -> Any:
        """Return a value as the whole call will have it, apart from its type."""
        (sent,) = self._syntax.call(self._name, {"": [value]}).arguments[""]
        return sent


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

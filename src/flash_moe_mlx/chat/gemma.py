"""Gemma 4's calls: ``call:name{key:value}``, with strings between markers of their own."""

import re
from dataclasses import dataclass
from typing import Any

from .calls import MAX_DEPTH, Call, NotACallError, read_json
from .notation import Head, UnfinishedError, next_item, partly, sign_at, skip_space
from .syntax import Block, CallSyntax

QUOTE = '<|"|>'

_HEADER = re.compile(r"\s*call:\s*([\w./-]+)\s*(?=\{)")
_BARE_KEY = re.compile(r"\s*([^\s:{}\[\],]+)\s*:")
_BARE_VALUE = re.compile(r"[^,\]}]*")


@dataclass(frozen=True)
class GemmaSyntax(CallSyntax):
    """Calls with unquoted keys, and strings between ``<|"|>``."""

    def spoken_of(self, block: str) -> bool:
        """Return whether other words than a call follow."""
        word = block.lstrip()
        return bool(word) and not word.startswith("call:"[: len(word)])

    def read(self, block: str, opening: str) -> Block:
        """Read calls up to the closing marker."""
        calls: list[Call] = []
        position = 0
        while header := _HEADER.match(block, position):
            arguments, position = self._notation.value(block, header.end())
            calls.append(self.call(header.group(1), arguments))
        if not calls:
            if self.symbols[self.closing] in block or len(block) > 128:
                raise NotACallError("a call must have a name and arguments by name")
            raise UnfinishedError
        return self.after(block, position, calls)

    def head(self, text: str, *, bare: bool) -> Head | None:
        """Return the head of the first call."""
        header = _HEADER.match(text)
        return header and Head(self.call(header.group(1), {}), header.end() + 1, self._notation)

    @property
    def _notation(self) -> "_GemmaNotation":
        return _GemmaNotation(self.symbols[QUOTE], self.symbols[self.closing])


@dataclass(frozen=True)
class _GemmaNotation:
    """Arguments as objects with unquoted keys."""

    quote: str
    closing: str
    written = False

    def key(self, text: str, position: int) -> tuple[str | None, int]:
        """Return the next name."""
        more, position = next_item(text, position, "}")
        if not more:
            return None, position
        if text.startswith(self.quote, position):
            key, position = self._string(text, position + len(self.quote))
            position = sign_at(text, position)
            if text[position] != ":":
                raise NotACallError("a key must be followed by :")
            return key, position + 1
        if bare := _BARE_KEY.match(text, position):
            return bare.group(1), bare.end()
        if self.closing not in text[position:]:
            raise UnfinishedError
        raise NotACallError("arguments must have keys")

    def opening(self, text: str, position: int) -> tuple[str, int]:
        """Return the sign that a value begins with."""
        position = sign_at(text, position)
        if text.startswith(self.quote, position):
            return '"', position + len(self.quote)
        if self.quote.startswith(text[position:]):
            raise UnfinishedError
        return (text[position], position + 1) if text[position] in "{[" else ("", position)

    def text_end(self, text: str, position: int) -> tuple[int, int | None]:
        """Return how far a string is certain; a quote that nothing which may follow a string follows is part of it."""
        while text.startswith(self.quote, position := partly(text, self.quote, position)):
            end = position + len(self.quote)
            if (following := skip_space(text, end)) == len(text):
                return position, None
            if text[following] in ",]}:":
                return position, end
            position = end
        return position, None

    def decoded(self, raw: str) -> str:
        """Return the text as it stands."""
        return raw

    def value(self, text: str, position: int, depth: int = 0) -> tuple[Any, int]:
        """Return a whole value."""
        sign, start = self.opening(text, position)
        if sign == '"':
            return self._string(text, start)
        if sign and depth > MAX_DEPTH:
            raise NotACallError(f"arguments must be nested at most {MAX_DEPTH} deep, got more")
        if sign == "{":
            return self._object(text, start, depth)
        if sign == "[":
            return self._list(text, start, depth)
        bare = _BARE_VALUE.match(text, start)
        if bare is None or bare.end() == len(text):
            raise UnfinishedError
        return self._bare(bare.group()), bare.end()

    def _object(self, text: str, position: int, depth: int) -> tuple[dict[str, Any], int]:
        members: dict[str, Any] = {}
        while True:
            key, position = self.key(text, position)
            if key is None:
                return members, position
            value, position = self.value(text, position, depth + 1)
            members.setdefault(key, value)
            position = self._separated(text, position, "}")

    def _list(self, text: str, position: int, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        while True:
            more, position = next_item(text, position, "]")
            if not more:
                return items, position
            value, position = self.value(text, position, depth + 1)
            items.append(value)
            position = self._separated(text, position, "]")

    def _bare(self, word: str) -> Any:
        if self.closing in word:
            raise NotACallError("arguments must have an end")
        try:
            return read_json(word)
        except NotACallError:
            return word.strip()

    def _string(self, text: str, start: int) -> tuple[str, int]:
        end, after = self.text_end(text, start)
        if after is None:
            raise UnfinishedError
        return text[start:end], after

    def _separated(self, text: str, position: int, end: str) -> int:
        """Return where a comma or the end is."""
        position = sign_at(text, position)
        if text[position] not in (",", end):
            raise NotACallError(f"items must be separated by commas, got {text[position : position + 10]!r}")
        return position

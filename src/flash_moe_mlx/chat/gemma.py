"""Gemma 4's calls: ``call:name{key:value}``, with strings between markers of their own."""

import re
from dataclasses import dataclass
from typing import Any

from .calls import MAX_DEPTH, Call, NotACallError, read_json
from .syntax import Block, CallSyntax, UnfinishedError, skip_space

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
            arguments, position = self._object(block, header.end(), 0)
            calls.append(self.call(header.group(1), arguments))
        if not calls:
            if self.symbols[self.closing] in block or len(block) > 128:
                raise NotACallError("a call must have a name and arguments by name")
            raise UnfinishedError
        return self.after(block, position, calls)

    def _object(self, text: str, position: int, depth: int) -> tuple[dict[str, Any], int]:
        if depth > MAX_DEPTH:
            raise NotACallError(f"arguments must be nested at most {MAX_DEPTH} deep, got more")
        result: dict[str, Any] = {}
        position = skip_space(text, position + 1)
        while not text.startswith("}", position):
            if text.startswith(self.symbols[QUOTE], position):
                key, position = self._string(text, position)
                position = self._expect(text, position, ":")
            elif bare := _BARE_KEY.match(text, position):
                key, position = bare.group(1), bare.end()
            elif position >= len(text) or self.symbols[self.closing] not in text[position:]:
                raise UnfinishedError
            else:
                raise NotACallError("arguments must have keys")
            result[key], position = self._value(text, position, depth)
            position = self._separated(text, position, "}")
        return result, position + 1

    def _list(self, text: str, position: int, depth: int) -> tuple[list[Any], int]:
        if depth > MAX_DEPTH:
            raise NotACallError(f"arguments must be nested at most {MAX_DEPTH} deep, got more")
        result: list[Any] = []
        position = skip_space(text, position + 1)
        while not text.startswith("]", position):
            value, position = self._value(text, position, depth)
            result.append(value)
            position = self._separated(text, position, "]")
        return result, position + 1

    def _value(self, text: str, position: int, depth: int) -> tuple[Any, int]:
        position = skip_space(text, position)
        if text.startswith(self.symbols[QUOTE], position):
            return self._string(text, position)
        if text.startswith("{", position):
            return self._object(text, position, depth + 1)
        if text.startswith("[", position):
            return self._list(text, position, depth + 1)
        bare = _BARE_VALUE.match(text, position)
        if bare is None or bare.end() == len(text):
            raise UnfinishedError
        return self._bare(bare.group()), bare.end()

    def _bare(self, word: str) -> Any:
        if self.symbols[self.closing] in word:
            raise NotACallError("arguments must have an end")
        try:
            return read_json(word)
        except NotACallError:
            return word.strip()

    def _string(self, text: str, position: int) -> tuple[str, int]:
        """Read a string; a quote inside it is one that nothing which may follow a string follows."""
        quote = self.symbols[QUOTE]
        start = end = position + len(quote)
        while (end := text.find(quote, end)) >= 0:
            following = skip_space(text, end + len(quote))
            if following >= len(text):
                raise UnfinishedError
            if text[following] in ",]}:":
                return text[start:end], end + len(quote)
            end += len(quote)
        raise UnfinishedError

    def _separated(self, text: str, position: int, end: str) -> int:
        """Return where the next item or the end is."""
        position = skip_space(text, position)
        if position >= len(text):
            raise UnfinishedError
        if text.startswith(",", position):
            return skip_space(text, position + 1)
        if not text.startswith(end, position):
            raise NotACallError(f"items must be separated by commas, got {text[position : position + 10]!r}")
        return position

    def _expect(self, text: str, position: int, sign: str) -> int:
        position = skip_space(text, position)
        if position >= len(text):
            raise UnfinishedError
        if not text.startswith(sign, position):
            raise NotACallError(f"a key must be followed by {sign}")
        return position + 1

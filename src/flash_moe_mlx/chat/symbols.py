"""Markers of an answer as characters that no text can hold, so that a marker is told from a text that looks like it."""

import re
from collections.abc import Iterable
from typing import Any

_FIRST = 0xD800  # half of a surrogate pair: decoded text never has one


class Symbols:
    """Maps each marker of a model's answers to a symbol.

    A marker that is a token of its own counts only as that token, and its symbol is one character. A marker that the
    vocabulary doesn't have is represented by its text.
    """

    def __init__(self, vocabulary: dict[str, int], markers: Iterable[str]):
        """Give each marker its symbol.

        Args:
            vocabulary: Ids by token.
            markers: Texts of the markers.
        """
        self._symbols: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._tokens: dict[int, str] = {}
        for marker in dict.fromkeys(marker for marker in markers if marker):
            symbol = marker
            if marker in vocabulary:
                symbol = chr(_FIRST + len(self._tokens))
                self._tokens[vocabulary[marker]] = symbol
                self._texts[symbol] = marker
            self._symbols[marker] = symbol

    def __getitem__(self, marker: str) -> str:
        """Return a marker's symbol, or its own text."""
        return self._symbols.get(marker, marker)

    def of(self, text: str) -> str:
        """Return a text of markers and other words with the symbols in place of the markers that are tokens."""
        for symbol, marker in self._texts.items():
            text = text.replace(marker, symbol)
        return text

    def token(self, token: int) -> str | None:
        """Return the symbol that a token is, or None."""
        return self._tokens.get(token)

    def token_of(self, marker: str) -> int | None:
        """Return the token that a marker is, or None."""
        symbol = self._symbols.get(marker)
        return next((token for token, own in self._tokens.items() if own == symbol), None)

    def text(self, said: str) -> str:
        """Return a text with its symbols written out."""
        if said.isascii():
            return said
        return _SYMBOL.sub(lambda match: self._texts.get(match.group(), "\ufffd"), said)

    def value(self, value: Any) -> Any:
        """Return a JSON value with the symbols in its strings written out."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {self.text(key): self.value(item) for key, item in value.items()}
        return value


_SYMBOL = re.compile("[\ud800-\udbff]")

"""Thinking inside the content of an answer, as servers without a field for it send it, told from words that look so.

Nothing in a text says which it is. So an answer of this process whose text holds the marker that ends thinking is
remembered by a digest, and is text when it comes back. Of other contents the form decides: that in which models and
servers write their thinking.
"""

import hashlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from .dialect import dialect_of

MAX_REMEMBERED = 4096
"""Digests kept for one tokenizer. Models hardly ever say the marker as text."""

_remembered: "WeakKeyDictionary[Any, dict[bytes, None]]" = WeakKeyDictionary()


class SpokenMarkers:
    """Remembers an answer whose text holds the marker that ends thinking."""

    def __init__(self, tokenizer: Any, end: str):
        """Begin an answer.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`.
            end: The marker; empty without thinking.
        """
        self._tokenizer = tokenizer
        self._end = end
        self._digest = hashlib.sha256()
        self._held = ""  # what may begin the marker
        self._begun = False
        self._done = not end

    def take(self, text: str) -> None:
        """Take text of the answer, thinking left out."""
        if self._done:
            return
        self._held += text
        if not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        if (found := self._held.find(self._end)) >= 0:
            self._digest.update(_bytes(self._held[:found]))
            _remember(self._tokenizer, self._digest.digest())
            self._done = True
            return
        sure = max(0, len(self._held) - len(self._end) + 1)
        self._digest.update(_bytes(self._held[:sure]))
        self._held = self._held[sure:]


def split_thinking(tokenizer: Any, content: str, *, has_calls: bool) -> tuple[str, str] | None:
    """Return the thinking and the answer that a content holds, or None where all of it is the answer.

    Args:
        tokenizer: From :func:`flash_moe_mlx.load`.
        content: An assistant's content that came without thinking besides it.
        has_calls: Whether calls came with it; without any, an answer follows the thinking.
    """
    dialect = dialect_of(tokenizer)
    start, end = dialect.think_start, dialect.think_end
    if not start or not end or end not in content:
        return None
    begun = content.lstrip()
    before, _, rest = begun.partition(end)
    if not (rest.strip() or has_calls):
        return None
    opened = begun.startswith(start)
    # Where the template opens the thinking, what a server passes on begins inside it.
    if not opened and (start in before or not before.endswith("\n") or not rest.startswith("\n\n")):
        return None
    if hashlib.sha256(_bytes(before)).digest() in _remembered.get(tokenizer, {}):
        return None
    return before.removeprefix(start).strip("\n"), rest.lstrip("\n")


def has_reasoning(message: Mapping[str, Any]) -> bool:
    """Return whether a message has a field for thinking, be it empty: then its content is the answer alone."""
    return any(isinstance(message.get(name), str) for name in ("reasoning_content", "reasoning", "thinking"))


def _remember(tokenizer: Any, digest: bytes) -> None:
    digests = _remembered.setdefault(tokenizer, {})
    digests.pop(digest, None)  # the last said comes last
    digests[digest] = None
    while len(digests) > MAX_REMEMBERED:
        digests.pop(next(iter(digests)), None)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")

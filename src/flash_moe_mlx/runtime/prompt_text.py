"""Early checks on prompt text: refuse what is not text or can't fit into the context, before tokenising it.

Tokenising takes about 360 bytes and 3 microseconds per character, so a prompt far longer than the context would cost in
proportion to what the client sent. No token covers more characters than the vocabulary's longest one, so a text's
length gives a lower bound on its number of tokens.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import RequestError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

_USUAL_CHARACTERS = 8
"""Characters per token that no ordinary text exceeds. Texts above it are tokenised and counted in pieces."""

_PIECE = 1 << 15
_SLACK = 1 << 16  # characters always allowed, so that a small context does not refuse ordinary text

_longest: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()


class PromptTooLongError(RequestError):
    """A prompt that does not fit into the context."""


def check_text(text: Any, where: str = "prompt") -> None:
    """Check that a value is a text that can be encoded.

    Raises:
        RequestError: If it is not text, or holds an unpaired surrogate, as from bytes that were not UTF-8.
    """
    if not isinstance(text, str):
        raise RequestError(f"[{where}] must be text, got {type(text).__name__}. Pass a str.")
    if not text.isascii() and (found := _LONE_SURROGATE.search(text)):
        raise RequestError(
            f"[{where}] must be Unicode text, got half of a surrogate pair at character {found.start()}. Encode it as "
            "UTF-8."
        )


def check_length(tokenizer: Any, text: str, max_tokens: int) -> None:
    """Check that a text may have at most ``max_tokens`` tokens, in time and memory proportional to ``max_tokens``.

    A text that passes may still have more tokens, but it is short enough to be tokenised and counted.

    Raises:
        PromptTooLongError: If it certainly has more tokens.
    """
    longest = longest_token(tokenizer)
    too_long = len(text) > max_tokens * longest
    if not too_long and len(text) > max_tokens * _USUAL_CHARACTERS:
        too_long = _counts_beyond(lambda piece: len(tokenizer.encode(piece)), text, max_tokens, longest)
    if too_long:
        raise PromptTooLongError(
            f"[prompt] must leave the context at most max_context = {max_tokens} tokens, got {len(text)} characters, "
            "which are more. Shorten it, or load with a larger max_context."
        )


def check_conversation(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Any, max_tokens: int) -> None:
    """Check that a conversation may fit into ``max_tokens``, before a template makes several copies of it.

    Templates reproduce contents whole except for surrounding white space, and calls and tools at about their own
    size; they often leave out the thinking of earlier turns.

    Raises:
        PromptTooLongError: If it certainly has more tokens.
    """
    room = max_tokens * longest_token(tokenizer)
    contents = sum(len(message["content"].strip()) for message in messages)
    structured = _characters([tools, [message.get("tool_calls") for message in messages]])
    thinking = sum(len(message.get("reasoning_content") or "") for message in messages)
    if contents > room or structured > 2 * room + _SLACK or thinking > 8 * room + 4 * _SLACK:
        raise PromptTooLongError(
            f"[messages] must leave the context at most max_context = {max_tokens} tokens, got "
            f"{contents + structured + thinking} characters, which are more. Shorten them, or load with a larger "
            "max_context."
        )


def _characters(value: Any) -> int:
    """Count the characters of all texts in a value, and one for each other item in it."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        total += len(item) if isinstance(item, str) else 1
        if isinstance(item, dict):
            left += item
            left += item.values()
        elif isinstance(item, list):
            left += item
    return total


def longest_token(tokenizer: Any) -> int:
    """Return the number of characters of the vocabulary's longest token."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if inner not in _longest:
        _longest[inner] = max(map(len, inner.get_vocab()), default=1)
    return _longest[inner]


def _counts_beyond(count: Callable[[str], int], text: str, max_tokens: int, margin: int) -> bool:
    """Return whether a text's pieces exceed ``max_tokens``, allowing for tokens split at their ends."""
    total = 0
    for start in range(0, len(text), _PIECE):
        total += max(0, count(text[start : start + _PIECE]) - margin)
        if total > max_tokens:
            return True
    return False

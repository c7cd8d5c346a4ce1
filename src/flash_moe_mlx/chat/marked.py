"""Tokens of a rendered conversation in which nothing that a person or a tool said is a control token.

A question that mentions ``<think>``, or a web page that holds ``<|im_end|>``, must not be read as the template's own
marks, by the template or by the tokenizer. Such words are broken by a character of no text before the template sees
them, and are encoded in two pieces after.
"""

import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from .dialect import template_of

_BREAK = "\ufdd0"  # a non-character: Unicode keeps it for uses like this one
_ESCAPED = "\\ufdd0"  # as JSON in ASCII has it
_AS_THEY_ARE = frozenset(("role", "type", "id", "tool_call_id"))

_patterns: "WeakKeyDictionary[Any, tuple[str, re.Pattern[str] | None]]" = WeakKeyDictionary()


def mark(tokenizer: Any, value: Any) -> Any:
    """Break the control tokens in the texts of a value.

    Args:
        tokenizer: From :func:`flash_moe_mlx.load`.
        value: Messages or tools. Names of objects are left as they are.
    """
    pattern = _control_tokens(tokenizer)
    return value if pattern is None else _marked(pattern, value)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that was rendered from marked values.

    Raises:
        UnicodeError: If it holds half of a surrogate pair.
    """
    first, *rest = text.replace(_ESCAPED, _BREAK).split(_BREAK)
    tokens = list(tokenizer.encode(first, add_special_tokens=False)) if first else []
    if rest:
        line = list(tokenizer.encode("\n", add_special_tokens=False))
        for piece in rest:
            # After a line end: alone, some tokenizers would put a space before it.
            behind = list(tokenizer.encode("\n" + piece, add_special_tokens=False))
            whole = behind[: len(line)] != line
            tokens += tokenizer.encode(piece, add_special_tokens=False) if whole else behind[len(line) :]
    return tokens


def unmarked(text: str) -> str:
    """Return a rendered text without the marks."""
    return text.replace(_ESCAPED, "").replace(_BREAK, "")


def _marked(pattern: "re.Pattern[str]", value: Any) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda token: token.group()[0] + _BREAK + token.group()[1:], value.replace(_BREAK, ""))
    if isinstance(value, Mapping):
        return {name: item if name in _AS_THEY_ARE else _marked(pattern, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(pattern, item) for item in value]
    return value


def _control_tokens(tokenizer: Any) -> "re.Pattern[str] | None":
    """Return what matches the tokens that a model reads as marks: special ones, and those that the template writes."""
    template = template_of(tokenizer)
    known = _patterns.get(tokenizer)
    if known is None or known[0] != template:
        hub = getattr(tokenizer, "_tokenizer", tokenizer)
        added = getattr(hub, "added_tokens_decoder", {}).values()
        words = {str(t.content) for t in added if t.special or t.content in template}
        longest_first = sorted((word for word in words if len(word.strip()) > 1), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        known = _patterns[tokenizer] = (template, pattern)
    return known[1]

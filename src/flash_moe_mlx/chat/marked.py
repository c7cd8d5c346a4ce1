"""Tokens of a rendered conversation in which nothing that a person or a tool said is a control token.

A question that mentions ``<think>``, or a web page that holds ``<|im_end|>``, must not be read as the template's own
marks, by the template or by the tokenizer. Such words are broken by a character of no text before the template sees
them, and are encoded in two pieces after.
"""

import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from .dialect import dialect_of, template_of

_BREAK = "\ufdd0"  # a non-character: Unicode keeps it for uses like this one
_ESCAPED = "\\ufdd0"  # as JSON in ASCII has it
_WORDS = re.compile(r"[\w.:-]*")
_KEPT = frozenset(("role", "type", "id", "tool_call_id"))  # templates compare and measure them
_THINKING = frozenset(("<think>", "</think>"))
_LOOKED_FOR = re.compile(
    r"""\.(?:split|rsplit|partition|rpartition|startswith|endswith|find|index|replace|count)\(\s*(["'])(.+?)\1"""
    r"""|(["'])((?:(?!\3).)+)\3\s+(?:not\s+)?in\b"""
)

_patterns: "WeakKeyDictionary[Any, tuple[str, re.Pattern[str]]]" = WeakKeyDictionary()


def mark(tokenizer: Any, value: Any) -> Any:
    """Break the control tokens in the texts of a value, names of objects included.

    Args:
        tokenizer: From :func:`flash_moe_mlx.load`.
        value: Messages or tools.
    """
    return _marked(_control_tokens(tokenizer), value)


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
        return {_named(pattern, name): _item(pattern, name, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(pattern, item) for item in value]
    return value


def _named(pattern: "re.Pattern[str]", name: Any) -> Any:
    return name if isinstance(name, str) and _WORDS.fullmatch(name) else _marked(pattern, name)


def _item(pattern: "re.Pattern[str]", name: Any, item: Any) -> Any:
    return _named(pattern, item) if name in _KEPT else _marked(pattern, item)


def _control_tokens(tokenizer: Any) -> "re.Pattern[str]":
    """Return what matches the words that are read as marks.

    The model reads special tokens and those that the template writes; the template, those that it looks for. The text
    of an escaped break is one too: it would be taken for a break.
    """
    template = template_of(tokenizer)
    known = _patterns.get(tokenizer)
    if known is None or known[0] != template:
        hub = getattr(tokenizer, "_tokenizer", tokenizer)
        added = getattr(hub, "added_tokens_decoder", {}).values()
        words = {str(t.content) for t in added if t.special or t.content in template}
        matches = _LOOKED_FOR.finditer(template)
        looked_for = {word for found in matches if (word := found.group(2) or found.group(4))[0] in "<["}
        if not dialect_of(tokenizer).think_end:
            looked_for -= _THINKING  # no tokens: thinking stays in the content, and only the template takes it out
        words |= {word for word in looked_for if word[-1] in ">]"} | {_ESCAPED}
        longest_first = sorted((word for word in words if len(word.strip()) > 1), key=len, reverse=True)
        known = _patterns[tokenizer] = (template, re.compile("|".join(map(re.escape, longest_first))))
    return known[1]

"""Tool calls of a model, in a form that clients and later prompts accept."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 64
"""Maximum nesting of arguments that JSON libraries and templates can process."""

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")

# Exceptions of parsers for text that is no call. Python's own parser is among them, and numbers may not fit.
PARSER_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, SyntaxError, ArithmeticError, RecursionError, MemoryError,
    AssertionError,
)  # fmt: skip


class NotACallError(ValueError):
    """A text that looks like a call and is none; the message says why."""


@dataclass(frozen=True)
class Call:
    """A call that the model makes.

    Attributes:
        name: The tool's name: 1 to 64 letters, digits and ``_.-``.
        arguments: Its arguments by name, which JSON can hold.
        id: The model's own, where it gave one.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None = None


def is_name(value: Any) -> bool:
    """Return whether clients and servers take it as a tool's name."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def checked_call(name: Any, arguments: Any, call_id: Any = None) -> Call:
    """Return a call whose parts can be sent to a client and come back.

    Args:
        name: The name, as the model said it.
        arguments: An object, JSON of one, or nothing.
        call_id: The model's own id, if any.

    Raises:
        NotACallError: If there is no such call.
    """
    if not is_name(name):
        raise NotACallError(f"a tool's name must be 1 to 64 letters, digits and _.-, got {_shown(name)}")
    if isinstance(arguments, str):
        arguments = read_json(arguments) if arguments.strip() else None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise NotACallError(f"arguments must be an object, got {_shown(arguments)}")
    own = isinstance(call_id, str) and 0 < len(call_id) <= 64 and call_id.isprintable()
    return Call(name, _sendable(arguments), call_id if own else None)


def read_json(text: str) -> Any:
    """Return the value of a JSON text, which may have line breaks in strings.

    Raises:
        NotACallError: If it is none.
    """
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NotACallError(f"arguments must be JSON, got {error}") from error


def read_arguments(arguments: Any) -> dict[str, Any]:
    """Return the arguments of an earlier call as an object, whatever another server made of them.

    What is no JSON, because it was cut or never was, comes under the name "arguments", so that the model sees it.
    """
    if isinstance(arguments, str):
        text = arguments
        if not text.strip():
            return {}
        arguments = text
        with suppress(NotACallError):
            arguments = read_json(text)
        if isinstance(arguments, str) and arguments != text:  # encoded twice
            return read_arguments(arguments)
    if arguments is None:
        return {}
    return mended(dict(arguments) if isinstance(arguments, Mapping) else {"arguments": arguments})


def mended(value: Any) -> Any:
    """Return a JSON value with U+FFFD in place of each half of a surrogate pair."""
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {mended(name): mended(item) for name, item in value.items()}
    return [mended(item) for item in value] if isinstance(value, list) else value


def mend_pairs(text: str) -> str:
    """Return JSON with U+FFFD in place of each escaped half of a surrogate pair; it is as long as it was."""
    if "\\u" not in text:
        return text
    return _ESCAPE.sub(lambda escape: "\\ufffd" if escape.group(1) else escape.group(), text)


_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


def read_calls(parser: Callable[[str, Any], Any], text: str, tools: Sequence[Mapping[str, Any]] | None) -> list[Call]:
    """Return the calls of a text by a parser of mlx_lm's.

    Args:
        parser: Takes the text between a call's markers, and tools.
        text: The text.
        tools: Tools, in the form that templates take.

    Raises:
        NotACallError: If it holds no call, or one that can't be sent.
    """
    try:
        parsed = parser(text, tools)
    except PARSER_ERRORS as error:
        raise NotACallError(str(error) or type(error).__name__) from error
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise NotACallError("a call must have a name and arguments by name")
    return [checked_call(call.get("name"), call.get("arguments"), call.get("id")) for call in calls]


def _sendable(value: Any, depth: int = 0) -> Any:
    """Copy a value with what JSON and UTF-8 can't hold refused or replaced."""
    if depth > MAX_DEPTH:
        raise NotACallError(f"arguments must be nested at most {MAX_DEPTH} deep, got more")
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_sendable(str(key)): _sendable(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_sendable(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(str(value))
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if value.bit_length() > 1024:
            raise NotACallError("numbers must fit into 1,024 bits, got a longer one")
        return value
    raise NotACallError(f"arguments must be JSON, got a {type(value).__name__}")


def _refuse(constant: str) -> Any:
    raise NotACallError(f"arguments must be JSON, got {constant}")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else "nothing" if value is None else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."

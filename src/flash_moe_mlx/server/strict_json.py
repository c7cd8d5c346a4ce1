"""Strict JSON parser for clients' input: Unicode texts, finite numbers, unique names within an object."""

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
"""Maximum nesting of objects and arrays. Python's own parser and serialiser give up at about 1,000."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(text: str) -> Any:
    """Parse JSON strictly: no NaN or infinity, no duplicate names in an object, no unpaired surrogates.

    Raises:
        ValueError: For any other input.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels") from None
    _check(value)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object that has a name twice")
    return result


def _check(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii() and _LONE_SURROGATE.search(item):
                    raise ValueError("half of a surrogate pair, which is no text")
            elif isinstance(item, float):
                if not math.isfinite(item):
                    raise ValueError("a number that is too large")
            elif isinstance(item, dict):
                deeper += item
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        if not deeper:
            return
        level = deeper
    raise ValueError(f"more than {MAX_DEPTH} levels")

"""Checks of values in a request's JSON, shared by the wire formats: errors name the field and say what it holds."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .api_error import ApiError


def describe(value: Any) -> str:
    """Return a text's beginning, "nothing" for null, and only the type of anything else, which may be large."""
    if isinstance(value, str):
        return repr(value[:80])[:80]
    return "nothing" if value is None else f"a {type(value).__name__}"


def wrong(where: str, must: str, got: Any) -> ApiError:
    """Return the error that a field is not what it must be.

    Args:
        where: Path of the field, such as ``messages[0].content``; its first name is the error's ``param``.
        must: What must hold, from "be" on.
        got: The field's value.
    """
    return ApiError(400, f"{where} must {must}, got {describe(got)}.", param=re.split(r"[.\[]", where)[0])


def as_object(value: Any, where: str) -> Mapping[str, Any]:
    """Return an object.

    Raises:
        ApiError: 400, if the value is none.
    """
    if not isinstance(value, Mapping):
        raise wrong(where, "be an object", value)
    return value


def as_optional_object(value: Any, where: str) -> Mapping[str, Any]:
    """Return an object; null, and the empty list as which PHP writes an empty object, are empty ones.

    Raises:
        ApiError: 400, if the value is none.
    """
    return {} if value in (None, [], "") else as_object(value, where)


def as_list(value: Any, where: str) -> Sequence[Any]:
    """Return a list; null is an empty one.

    Raises:
        ApiError: 400, if the value is none.
    """
    if value is not None and not isinstance(value, list):
        raise wrong(where, "be a list", value)
    return value or []


def as_text(value: Any, where: str) -> str:
    """Return a text.

    Raises:
        ApiError: 400, if the value is none.
    """
    if not isinstance(value, str):
        raise wrong(where, "be a text", value)
    return value


def joined_text(content: Any, where: str, fields: Mapping[str, str]) -> str:
    """Return a content as text: a text as it is, the texts of a list of parts joined; null is empty.

    Args:
        content: The content.
        where: Path of the field.
        fields: Types of parts that are text, with the field that holds the text.

    Raises:
        ApiError: 400, for anything else.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(where, "be a text or a list of parts", content)
    texts = []
    for i, part in enumerate(content):
        kind = as_object(part, f"{where}[{i}]").get("type")
        text = part.get(fields[kind]) if isinstance(kind, str) and kind in fields else None
        if not isinstance(text, str):
            raise ApiError(
                400, f"{where}[{i}] must be a part of type text: this model reads text.", param=where.split("[")[0]
            )
        texts.append(text)
    return "".join(texts)

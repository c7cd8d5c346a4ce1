"""Messages and tools of a chat request, checked and brought to the form that chat templates take."""

import re
from collections.abc import Mapping
from typing import Any

from .api_error import ApiError
from .strict_json import parse_json

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MAX_TOOLS = 128

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with text contents, and arguments of earlier tool calls as objects, which is what templates loop over.

    Raises:
        ApiError: 400 naming the message that is wrong.
    """
    if not isinstance(value, list) or not value:
        raise ApiError(400, f"messages must be a list of at least one message, got {_kind(value)}.", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools as they were sent.

    Raises:
        ApiError: 400 naming the tool that is wrong.
    """
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise ApiError(400, f"tools must be a list of at most {MAX_TOOLS} tools, got {_kind(value)}.", param="tools")
    for i, tool in enumerate(value):
        where = f"tools[{i}]"
        if _object(tool, where).get("type") != "function":
            raise ApiError(400, f'{where}.type must be "function", got {_kind(tool.get("type"))}.', param="tools")
        function = _object(tool.get("function"), f"{where}.function")
        _name(function.get("name"), f"{where}.function.name")
        if not isinstance(function.get("description") or "", str):
            raise ApiError(400, f"{where}.function.description must be a text.", param="tools")
        parameters = _object(function.get("parameters") or {}, f"{where}.function.parameters")
        properties = _object(parameters.get("properties") or {}, f"{where}.function.parameters.properties")
        for name, schema in properties.items():
            _object(schema, f"{where}.function.parameters.properties.{name}")
    return value


def _message(message: Any, where: str) -> dict[str, Any]:
    role = _object(message, where).get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}, got {_kind(role)}.", param="messages")
    calls = message.get("tool_calls")
    if calls is not None and (role != "assistant" or not isinstance(calls, list)):
        raise ApiError(400, f"{where}.tool_calls must be a list, in a message of the assistant.", param="messages")
    result: dict[str, Any] = {
        "role": ROLES[role],
        "content": _text(message.get("content"), bool(calls), f"{where}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := message.get(name)) is not None:
            if not isinstance(value, str):
                raise ApiError(400, f"{where}.{name} must be a text, got {_kind(value)}.", param="messages")
            result[name] = value
    if calls:
        result["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return result


def _text(content: Any, optional: bool, where: str) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where} must be a text or a list of parts, got {_kind(content)}.", param="messages")
    for i, part in enumerate(content):
        if _object(part, f"{where}[{i}]").get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{where}[{i}] must be a part of type text: this model reads text.", param="messages")
    return "".join(part["text"] for part in content)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = _object(_object(call, where).get("function"), f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except ValueError:
            raise ApiError(400, f"{where}.function.arguments must be JSON, got {_kind(arguments)}.") from None
    name = _name(function.get("name"), f"{where}.function.name")
    arguments = _object(arguments, f"{where}.function.arguments")
    return {"type": "function", "id": str(call.get("id")), "function": {"name": name, "arguments": arguments}}


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ApiError(400, f"{where} must be 1 to 64 letters, digits and _.-, got {_kind(value)}.", param="tools")
    return value


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{where} must be an object, got {_kind(value)}.", param=where.split("[")[0])
    return value


def _kind(value: Any) -> str:
    return (
        repr(value[:80])[:80] if isinstance(value, str) else "nothing" if value is None else f"a {type(value).__name__}"
    )

"""Validation of a chat request's messages and tools, and conversion to the form that chat templates take."""

import re
from typing import Any

from ..chat.calls import read_arguments
from .api_error import ApiError
from .fields import as_object, as_text, describe, joined_text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "function": "tool"}  # fmt: skip
MAX_TOOLS = 128

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Return messages with text contents, and with earlier tool calls' arguments as objects, as templates need them.

    Raises:
        ApiError: 400, naming the invalid message.
    """
    if not isinstance(value, list) or not value:
        raise ApiError(
            400, f"messages must be a list of at least one message, got {describe(value)}.", param="messages"
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the tools unchanged, after checking them.

    Raises:
        ApiError: 400, naming the invalid tool.
    """
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise ApiError(400, f"tools must be a list of at most {MAX_TOOLS} tools, got {describe(value)}.", param="tools")
    for i, tool in enumerate(value):
        where = f"tools[{i}]"
        if as_object(tool, where).get("type") != "function":
            raise ApiError(400, f'{where}.type must be "function", got {describe(tool.get("type"))}.', param="tools")
        function = as_object(tool.get("function"), f"{where}.function")
        _name(function.get("name"), f"{where}.function.name")
        if not isinstance(function.get("description") or "", str):
            raise ApiError(400, f"{where}.function.description must be a text.", param="tools")
        parameters = as_object(function.get("parameters") or {}, f"{where}.function.parameters")
        properties = as_object(parameters.get("properties") or {}, f"{where}.function.parameters.properties")
        for name, schema in properties.items():
            if not isinstance(schema, bool):  # JSON Schema's short forms: true accepts anything, false nothing
                as_object(schema, f"{where}.function.parameters.properties.{name}")
    return value


def _message(message: Any, where: str) -> dict[str, Any]:
    role = as_object(message, where).get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}, got {describe(role)}.", param="messages")
    calls = message.get("tool_calls")
    if not calls and role == "assistant" and message.get("function_call"):  # the API's older form
        calls = [{"function": message["function_call"]}]
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise ApiError(400, f"{where}.tool_calls must be a list, in a message of the assistant.", param="messages")
    if "content" not in message and role in ("user", "system", "developer"):
        raise ApiError(400, f"{where}.content must be a text or a list of parts, got nothing.", param="messages")
    content = message.get("refusal") if message.get("content") is None else message["content"]
    result: dict[str, Any] = {
        "role": ROLES[role],
        "content": joined_text(content, f"{where}.content", _PARTS),
    }
    for name, kept in _TEXTS.items():
        if (value := message.get(name)) is not None:
            result.setdefault(kept, as_text(value, f"{where}.{name}"))
    if calls:
        result["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return result


_TEXTS = {
    "name": "name", "tool_call_id": "tool_call_id", "reasoning_content": "reasoning_content",
    "reasoning": "reasoning_content",
}  # fmt: skip
"""Fields of a message besides its content, with their names in chat templates."""


_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}
"""Types of content parts that are text, with the field that holds the text."""


def _call(call: Any, where: str) -> dict[str, Any]:
    function = as_object(as_object(call, where).get("function"), f"{where}.function")
    name = as_text(function.get("name"), f"{where}.function.name")
    arguments = read_arguments(function.get("arguments"))
    call_id = call.get("id")
    named = {"id": call_id if isinstance(call_id, str) else str(call_id)} if call_id is not None else {}
    return {"type": "function", **named, "function": {"name": name, "arguments": arguments}}


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ApiError(400, f"{where} must be 1 to 64 letters, digits and _.-, got {describe(value)}.", param="tools")
    return value

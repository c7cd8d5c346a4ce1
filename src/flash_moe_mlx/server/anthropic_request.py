"""Requests of Anthropic's API, /v1/messages, brought to the form of a chat request.

Unknown fields are ignored, as are cache_control and metadata: clients send many beta fields. Blocks and tools that the
model can't take are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .api_error import ApiError
from .fields import as_list, as_object, as_text, wrong
from .schema import GenerationRequest, Sampling, parse_chat

_BILLING = "x-anthropic-billing-header:"
"""How Claude Code begins a block of the system prompt that differs in every request and tells a model nothing."""

_SAME = ("model", "temperature", "top_p", "top_k", "stream", "seed", "min_p", "chat_template_kwargs")


def parse_messages(body: Any, model_id: str, vocabulary: int, defaults: Sampling) -> GenerationRequest:
    """Parse the body of /v1/messages or /v1/messages/count_tokens.

    Raises:
        ApiError: 400, naming the invalid field; 404 for a model other than ``model_id``.
    """
    body = as_object(body, "the body")
    chat = {name: body[name] for name in _SAME if body.get(name) is not None}
    chat["messages"] = [*_system(body.get("system")), *_messages(body.get("messages"))]
    chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(as_list(body.get("tools"), "tools"))]
    chat |= _choice(body.get("tool_choice"))
    chat["max_tokens"] = body.get("max_tokens")
    chat["stop"] = body.get("stop_sequences")
    if (output := _format(body)) is not None:
        chat["response_format"] = output
    thinking = as_object(body.get("thinking") or {}, "thinking")
    kind = thinking.get("type", "disabled")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise ApiError(400, "thinking.type must be enabled, adaptive or disabled, got another.", param="thinking")
    chat["enable_thinking"] = kind != "disabled"
    request = parse_chat(chat, model_id, vocabulary, defaults)
    budget = thinking.get("budget_tokens") if kind == "enabled" else None
    if budget is not None and (type(budget) is not int or budget < 0):
        raise ApiError(400, "thinking.budget_tokens must be a whole number from 0, got another.", param="thinking")
    return replace(request, thinking_budget=budget)


def _system(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    texts = (
        [value]
        if isinstance(value, str)
        else [_text(b, f"system[{i}]") for i, b in enumerate(as_list(value, "system"))]
    )
    text = "\n\n".join(text for text in texts if text and not text.startswith(_BILLING))
    return [{"role": "system", "content": text}] if text else []


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "be a list of at least one message", value)
    return [message for i, item in enumerate(value) for message in _message(item, f"messages[{i}]")]


def _message(message: Any, where: str) -> list[dict[str, Any]]:
    role = as_object(message, where).get("role")
    if role not in ("user", "assistant", "system"):
        raise ApiError(400, f"{where}.role must be user or assistant, got another.", param="messages")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = [(as_object(b, f"{where}.content[{i}]"), f"{where}.content[{i}]")
              for i, b in enumerate(as_list(content, f"{where}.content"))]  # fmt: skip
    if role == "assistant":
        return [_assistant(blocks)]
    result: list[dict[str, Any]] = []
    texts: list[str] = []
    for block, place in blocks:
        if block.get("type") == "tool_result":
            result.append(_result(block, place))
        else:
            texts.append(_text(block, place))
    return [*result, {"role": role, "content": "\n\n".join(texts)}] if texts or not result else result


def _assistant(blocks: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block, where in blocks:
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(as_text(block.get("thinking"), f"{where}.thinking"))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"type": "function", "id": block.get("id"), "function": function})
        elif kind != "redacted_thinking":
            texts.append(_text(block, where))
    # A field for thinking, be it empty, says that the text is the answer alone.
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts), "reasoning_content": "".join(thoughts)}
    return message | ({"tool_calls": calls} if calls else {})


def _result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    if isinstance(content, list):
        content = "\n".join(_text(as_object(b, f"{where}.content[{i}]"), f"{where}.content[{i}]")
                            for i, b in enumerate(content))  # fmt: skip
    text = "" if content is None else as_text(content, f"{where}.content")
    call_id = as_text(block.get("tool_use_id"), f"{where}.tool_use_id")
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def _text(block: Any, where: str) -> str:
    """Return the text of a block."""
    kind = as_object(block, where).get("type")
    if kind == "text":
        return as_text(block.get("text"), f"{where}.text")
    if kind == "document" and as_object(block.get("source"), f"{where}.source").get("type") == "text":
        title = f"{block['title']}\n\n" if isinstance(block.get("title"), str) else ""
        return title + as_text(block["source"].get("data"), f"{where}.source.data")
    if kind == "tool_reference":
        return f"The tool {block.get('tool_name')} may be called."
    shown = kind if isinstance(kind, str) and len(kind) < 40 else "another"
    raise ApiError(400, f"{where}.type must be text: this model reads text, got {shown}.", param=where.split("[")[0])


def _tool(tool: Any, where: str) -> dict[str, Any]:
    kind = as_object(tool, where).get("type") or "custom"
    if kind != "custom":
        raise ApiError(
            400, f"{where}.type must be custom: this server runs no tools itself, got {str(kind)[:40]}.", param="tools"
        )
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    strict = {"strict": tool["strict"]} if isinstance(tool.get("strict"), bool) else {}
    return {"type": "function", "function": function | strict}


def _choice(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    kind = as_object(value, "tool_choice").get("type")
    choices: dict[Any, Any] = {"auto": "auto", "any": "required", "none": "none"}
    choices["tool"] = {"type": "function", "function": {"name": value.get("name")}}
    if not isinstance(kind, str) or kind not in choices:
        raise ApiError(400, "tool_choice.type must be auto, any, tool or none, got another.", param="tool_choice")
    alone = value.get("disable_parallel_tool_use") is True
    return {"tool_choice": choices[kind], "parallel_tool_calls": not alone}


def _format(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the chat API's form of a schema for the answer."""
    output = body.get("output_config")
    wanted = output.get("format") if isinstance(output, Mapping) else body.get("output_format")
    if wanted is None:
        return None
    if as_object(wanted, "output_config.format").get("type") != "json_schema":
        raise ApiError(400, "output_config.format.type must be json_schema, got another.", param="output_config")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.get("schema")}}

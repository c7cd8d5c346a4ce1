"""Requests of OpenAI's /v1/responses, brought to the form of a chat request.

Tools that OpenAI runs itself (web_search and others) and items of them are ignored: clients offer them unasked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .api_error import ApiError
from .fields import as_list, as_object, as_text, joined_text, wrong
from .response_store import ResponseStore
from .schema import GenerationRequest, Sampling, parse_chat

_SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "top_k", "min_p", "seed",
         "chat_template_kwargs")  # fmt: skip
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal", "summary_text": "text",
          "reasoning_text": "text"}  # fmt: skip
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_RESULTS = ("function_call_output", "custom_tool_call_output")
_IGNORED = ("web_search_call", "item_reference", "image_generation_call", "code_interpreter_call", "file_search_call")
_ECHOED = ("instructions", "metadata", "tools", "tool_choice", "parallel_tool_calls", "temperature", "top_p",
           "max_output_tokens", "previous_response_id", "reasoning", "text", "truncation", "store",
           "prompt_cache_key")  # fmt: skip


def parse_response(
    body: Any, model_id: str, vocabulary: int, defaults: Sampling, *, store: ResponseStore
) -> GenerationRequest:
    """Parse the body of /v1/responses.

    Raises:
        ApiError: 400, naming the invalid field; 404 for a model other than ``model_id``, or an earlier response that is
            not stored.
    """
    body = as_object(body, "body")
    for name in ("background", "prompt", "conversation"):
        if body.get(name) not in (None, False, {}, ""):
            raise ApiError(400, f"{name} is not supported. Leave it out.", param=name, code="unsupported_parameter")
    messages = _earlier(body.get("previous_response_id"), store) + _input(body.get("input"))
    chat = {name: body[name] for name in _SAME if body.get(name) is not None}
    given = body.get("instructions")
    instructions = "" if given is None else as_text(given, "instructions")
    chat["messages"] = [*([{"role": "system", "content": instructions}] if instructions else []), *messages]
    tools = as_list(body.get("tools"), "tools")
    chat["tools"] = [tool for i, given in enumerate(tools) for tool in _tools(given, f"tools[{i}]")]
    chat["tool_choice"] = _choice(body.get("tool_choice"), chat["tools"])
    chat["max_tokens"] = body.get("max_output_tokens")
    if (output := as_object(body.get("text") or {}, "text").get("format")) is not None:
        chat["response_format"] = _format(as_object(output, "text.format"))
    effort = as_object(body.get("reasoning") or {}, "reasoning").get("effort")
    if effort is not None:
        chat["reasoning_effort"] = effort
    request = parse_chat(chat, model_id, vocabulary, defaults)
    echo = {name: body[name] for name in _ECHOED if body.get(name) is not None}
    return replace(request, echo={**echo, "messages": messages if body.get("store") is not False else None})


def not_stored(name: str, advice: str = "") -> ApiError:
    """Return the error of a response's id that is not in the store.

    Args:
        name: The field or place that holds the id.
        advice: Text after it.
    """
    param, code = (name, "previous_response_not_found") if advice else (None, "response_not_found")
    told = f"{name} must be that of a response that is still stored, got another.{advice}"
    return ApiError(404, told, param=param, code=code)


def _earlier(previous: Any, store: ResponseStore) -> list[dict[str, Any]]:
    if previous is None:
        return []
    kept = store.get(previous) if isinstance(previous, str) else None
    if kept is None:
        raise not_stored("previous_response_id", " Send the whole input.")
    return kept


def _input(value: Any) -> list[dict[str, Any]]:
    """Return the messages of the input's items; neighbours that are one answer are one message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise wrong("input", "be a text or a list of items", value)
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None
    for i, item in enumerate(value):
        where = f"input[{i}]"
        kind = as_object(item, where).get("type") or "message"
        role = "assistant" if kind in ("reasoning", *_CALLS) else item.get("role")
        if kind in _IGNORED:
            continue
        if kind not in ("message", "reasoning", *_CALLS, *_RESULTS):
            raise ApiError(400, f"{where}.type must be a message or a function's call or output.", param="input")
        if kind in _RESULTS:
            call_id = as_text(item.get("call_id"), f"{where}.call_id")
            output = joined_text(item.get("output"), f"{where}.output", _TEXTS)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            answer = None
        elif role != "assistant":
            messages.append({"role": role, "content": joined_text(item.get("content"), f"{where}.content", _TEXTS)})
            answer = None
        else:
            begins = kind == "reasoning" or (kind == "message" and answer is not None and answer["content"])
            if answer is None or (begins and (answer["content"] or answer.get("tool_calls"))):
                answer = {"role": "assistant", "content": ""}
                messages.append(answer)
            _add(answer, item, kind, where)
    return messages


def _add(answer: dict[str, Any], item: Mapping[str, Any], kind: str, where: str) -> None:
    """Add an item to the answer that it is part of."""
    if kind == "reasoning":
        thought = joined_text(item.get("content") or item.get("summary"), where, _TEXTS)
        answer["reasoning_content"] = answer.get("reasoning_content", "") + thought
    elif kind == "message":
        answer["content"] += joined_text(item.get("content"), f"{where}.content", _TEXTS)
        answer.setdefault("reasoning_content", "")  # a field says that the text is the answer alone
    else:
        call_id = as_text(item.get("call_id"), f"{where}.call_id")
        arguments = item.get(_CALLS[kind])
        if kind == "custom_tool_call":
            arguments = {"input": arguments}
        function = {"name": item.get("name"), "arguments": arguments}
        answer.setdefault("tool_calls", []).append({"type": "function", "id": call_id, "function": function})


def _tools(tool: Any, where: str) -> Sequence[dict[str, Any]]:
    """Return a tool in the chat API's form: nothing for one that OpenAI runs."""
    kind = as_object(tool, where).get("type")
    if kind == "function":
        function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
        return [{"type": "function", "function": function}]
    if kind == "namespace":
        inner = tool.get("tools")
        return [made for i, t in enumerate(inner if isinstance(inner, list) else ())
                for made in _tools(t, f"{where}.tools[{i}]")]  # fmt: skip
    if kind == "custom":  # in free form: here a function of one text, and what comes of it is sent as it was asked for
        parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": parameters}
        return [{"type": "function", "function": function}]
    return []


def _choice(value: Any, tools: Sequence[Mapping[str, Any]]) -> Any:
    if isinstance(value, Mapping) and value.get("type") == "function":
        return {"type": "function", "function": {"name": value.get("name")}}
    if isinstance(value, Mapping) and value.get("type") == "allowed_tools":
        return value.get("mode", "auto")
    return None if value == "auto" and not tools else value


def _format(output: Mapping[str, Any]) -> dict[str, Any]:
    if output.get("type") != "json_schema":
        return dict(output)
    names = ("name", "schema", "strict", "description")
    return {"type": "json_schema", "json_schema": {name: output[name] for name in names if name in output}}

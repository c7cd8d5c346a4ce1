"""OpenAI's responses: output items, whole and as events."""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from .api_error import ApiError
from .generation import Finished, Generation
from .openai_format import KEEP_ALIVE
from .parts import AnswerPart, TextPart, ToolCall, ToolCallDelta, ToolCallEnd, ToolCallStart
from .response_store import ResponseStore

_NAMES = {"content": "output_text", "reasoning": "reasoning_text"}
_DEFAULTS: dict[str, Any] = {
    "instructions": None, "metadata": {}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
    "temperature": None, "top_p": None, "max_output_tokens": None, "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}}, "truncation": "disabled",
    "store": True,
}  # fmt: skip


class ResponseFormat:
    """The answer to one request of /v1/responses."""

    def __init__(self, store: ResponseStore, model_id: str, generation: Generation):
        """Begin an answer.

        Args:
            store: Where the conversation is kept.
            model_id: The model's name.
            generation: The generation, whose request was read.
        """
        self._store = store
        self._model = model_id
        self._echo = dict(generation.request.echo)
        self._messages = self._echo.pop("messages", None)
        tools = self._echo.get("tools", [])
        self._custom = {str(tool.get("name")) for tool in tools if tool.get("type") == "custom"}
        self._echo["tools"] = [
            {"parameters": None, "strict": None, **tool} if tool.get("type") == "function" else tool for tool in tools
        ]
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None  # the channel of the item that is being sent
        self._number = 0

    def whole(self, parts: Sequence[AnswerPart], finished: Finished) -> dict[str, Any]:
        """Return the complete answer."""
        for part in parts:
            for _ in self._events(part):
                pass
        for _ in self._close():
            pass
        return self._finished(finished)

    def start(self) -> bytes:
        """Return what precedes the first token."""
        begun = self._response("in_progress")
        return self._sent([("response.created", {"response": begun}), ("response.in_progress", {"response": begun})])

    def part(self, part: AnswerPart) -> bytes:
        """Return the events of one part of the answer."""
        return self._sent(self._events(part))

    def silence(self) -> bytes:
        """Return what keeps the connection alive."""
        return KEEP_ALIVE

    def end(self, finished: Finished) -> bytes:
        """Return the events at the end."""
        closed = self._sent(self._close())
        response = self._finished(finished)
        return closed + self._sent([(f"response.{response['status']}", {"response": response})])

    def failed(self, error: ApiError) -> bytes:
        """Return the event of an error after the start."""
        told = {"code": "server_error", "message": error.message}
        return self._sent([("response.failed", {"response": {**self._response("failed"), "error": told}})])

    def _events(self, part: AnswerPart) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(part, ToolCall):
            yield from self._begin_call(part.name, part.id)
            yield from self._call_delta(part.arguments)
            yield from self._end_call(part, "completed")
        elif isinstance(part, ToolCallStart):
            yield from self._begin_call(part.name, part.id)
        elif isinstance(part, ToolCallDelta):
            yield from self._call_delta(part.arguments)
        elif isinstance(part, ToolCallEnd):
            yield from self._end_call(part.call, "completed" if part.whole else "incomplete")
        elif isinstance(part, TextPart):
            if part.channel != self._open:
                yield from self._close()
                self._open = part.channel
                yield from self._begin(_item(part.channel))
                yield "response.content_part.added", {**self._where(), "part": _content(part.channel, "")}
            self._items[-1]["content"][0]["text"] += part.text
            logprobs: dict[str, Any] = {"logprobs": []} if part.channel == "content" else {}
            yield f"response.{_NAMES[part.channel]}.delta", {**self._where(), "delta": part.text, **logprobs}

    def _begin_call(self, name: str, call_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._close()
        kind, field = ("custom_tool_call", "input") if name in self._custom else ("function_call", "arguments")
        item = {"id": f"fc_{uuid.uuid4().hex}", "call_id": call_id, "name": name, "status": "in_progress"}
        yield from self._begin({"type": kind, **item, field: ""})

    def _call_delta(self, arguments: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._items[-1]["type"] == "function_call":  # the text in free form is known at the end
            yield "response.function_call_arguments.delta", {**self._item(), "delta": arguments}

    def _end_call(self, call: ToolCall, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._items[-1]["type"] == "function_call":
            field, event, text = "arguments", "function_call_arguments", call.arguments
        else:
            field, event, text = "input", "custom_tool_call_input", _free_text(call.arguments)
            yield f"response.{event}.delta", {**self._item(), "delta": text}
        yield f"response.{event}.done", {**self._item(), "name": call.name, field: text}
        done = self._items[-1] = {**self._items[-1], field: text, "status": status}
        yield "response.output_item.done", {"output_index": len(self._items) - 1, "item": done}

    def _begin(self, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "response.output_item.added", {"output_index": len(self._items), "item": item}
        content = {"content": [_content(self._open, "")]} if self._open else {}
        self._items.append({**item, **content})

    def _close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        channel, self._open = self._open, None
        if channel is None:
            return
        item = self._items[-1] = {**self._items[-1], "status": "completed"}
        text = item["content"][0]["text"]
        logprobs: dict[str, Any] = {"logprobs": []} if channel == "content" else {}
        yield f"response.{_NAMES[channel]}.done", {**self._where(), "text": text, **logprobs}
        yield "response.content_part.done", {**self._where(), "part": item["content"][0]}
        yield "response.output_item.done", {"output_index": len(self._items) - 1, "item": item}

    def _where(self) -> dict[str, Any]:
        return {**self._item(), "content_index": 0}

    def _item(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _finished(self, finished: Finished) -> dict[str, Any]:
        """Return the response at its end, and keep the conversation."""
        cut = finished.reason == "length"
        if cut and self._items:
            self._items[-1] = {**self._items[-1], "status": "incomplete"}
        usage = {
            "input_tokens": finished.prompt_tokens,
            "input_tokens_details": {"cached_tokens": finished.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": finished.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        }  # fmt: skip
        why = {"reason": "max_output_tokens"} if cut else None
        status = "incomplete" if cut else "completed"
        response = {**self._response(status), "incomplete_details": why, "usage": usage}
        if self._messages is not None:
            self._store.put(self._id, [*self._messages, _message(self._items)], response)
        return response

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": None, "model": self._model, "output": list(self._items), "usage": None,
            **_DEFAULTS, **self._echo,
        }  # fmt: skip

    def _sent(self, events: Sequence[tuple[str, dict[str, Any]]] | Iterator[tuple[str, dict[str, Any]]]) -> bytes:
        lines = b""
        for name, value in events:
            data = {"type": name, "sequence_number": self._number, **value}
            self._number += 1
            text = json.dumps(data, ensure_ascii=False, allow_nan=False)
            lines += f"event: {name}\ndata: {text}\n\n".encode(errors="replace")
        return lines


def _free_text(arguments: str) -> str:
    """Return the text of a call in free form; the JSON as far as it came where that was cut."""
    with suppress(ValueError):
        return str(json.loads(arguments).get("input", ""))
    return arguments


def _item(channel: str) -> dict[str, Any]:
    """Return an item without content."""
    if channel == "content":
        return {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress",
                "content": []}  # fmt: skip
    return {"type": "reasoning", "id": f"rs_{uuid.uuid4().hex}", "summary": [], "status": "in_progress", "content": []}


def _content(channel: str | None, text: str) -> dict[str, Any]:
    if channel == "content":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": text}


def _message(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the items as one message of the assistant."""

    def texts(kind: str) -> str:
        return "".join(item["content"][0]["text"] for item in items if item["type"] == kind)

    calls = []
    for item in items:
        if item["type"] in ("function_call", "custom_tool_call"):
            arguments = item["arguments"] if "arguments" in item else {"input": item["input"]}
            function = {"name": item["name"], "arguments": arguments}
            calls.append({"type": "function", "id": item["call_id"], "function": function})
    message = {"role": "assistant", "content": texts("message"), "reasoning_content": texts("reasoning")}
    return message | ({"tool_calls": calls} if calls else {})

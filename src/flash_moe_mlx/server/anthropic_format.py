"""Anthropic's response format: messages of content blocks, whole and as events."""

import json
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from .api_error import ApiError, anthropic_error
from .generation import Finished, Generation
from .parts import AnswerPart, TextPart, ToolCall, ToolCallDelta, ToolCallStart

SIGNATURE = "Zmxhc2gtbW9l"
"""Signature of thinking blocks: clients send them back with it, and it is not looked at."""

_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def model_list(description: dict[str, Any]) -> dict[str, Any]:
    """Return the list of models."""
    return {"data": [model(description)], "has_more": False, "first_id": description["id"],
            "last_id": description["id"]}  # fmt: skip


def model(description: dict[str, Any]) -> dict[str, Any]:
    """Return one model, from its description in OpenAI's form."""
    context = description["max_model_len"]
    created = datetime.fromtimestamp(description["created"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": "model", "id": description["id"], "display_name": description["id"], "lifecycle": "active",
            "created_at": created, "max_input_tokens": context, "max_tokens": context}  # fmt: skip


class MessagesFormat:
    """The answer to one request of /v1/messages."""

    def __init__(self, model_id: str, generation: Generation):
        """Begin an answer.

        Args:
            model_id: The model's name.
            generation: The generation, whose prompt was read.
        """
        self._model = model_id
        self._prompt_tokens = generation.prompt_tokens
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._index = -1
        self._open = ""  # kind of the block that is being sent

    def whole(self, parts: Sequence[AnswerPart], finished: Finished) -> dict[str, Any]:
        """Return the complete answer."""
        blocks: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, ToolCall):
                blocks.append({**_block(part), "input": json.loads(part.arguments)})
            elif isinstance(part, TextPart):
                name = _field(part)
                if not blocks or name not in blocks[-1]:
                    blocks.append({**_block(part), **({"signature": SIGNATURE} if name == "thinking" else {})})
                blocks[-1][name] += part.text
        return {**self._message(blocks), **_stop(finished), "usage": _usage(finished)}

    def start(self) -> bytes:
        """Return what precedes the first token."""
        message = self._message([])
        return _events(("message_start", {"message": message}))

    def part(self, part: AnswerPart) -> bytes:
        """Return the events of one part of the answer."""
        events: list[tuple[str, dict[str, Any]]] = []
        if isinstance(part, ToolCall):
            events = [*self._close(), *self._begin(part)]
            events.append(self._delta({"type": "input_json_delta", "partial_json": part.arguments}))
        elif isinstance(part, ToolCallStart):
            events = [*self._close(), *self._begin(ToolCall(part.name, "", part.id))]
        elif isinstance(part, ToolCallDelta):
            events = [self._delta({"type": "input_json_delta", "partial_json": part.arguments})]
        elif isinstance(part, TextPart):
            name = _field(part)
            if name != self._open:
                events = [*self._close(), *self._begin(part)]
            events.append(self._delta({"type": f"{name}_delta", name: part.text}))
        return _events(*events)

    def silence(self) -> bytes:
        """Return what keeps the connection alive."""
        return _events(("ping", {}))

    def end(self, finished: Finished) -> bytes:
        """Return the events at the end."""
        last = {"delta": _stop(finished), "usage": _usage(finished)}
        return _events(*self._close(), ("message_delta", last), ("message_stop", {}))

    def failed(self, error: ApiError) -> bytes:
        """Return the event of an error after the start."""
        return _events(("error", {"error": anthropic_error(error)["error"]}))

    def _message(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0, "cache_creation_input_tokens": 0,
                 "cache_read_input_tokens": 0}  # fmt: skip
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": blocks,
                "stop_reason": None, "stop_sequence": None, "usage": usage}  # fmt: skip

    def _begin(self, part: TextPart | ToolCall) -> list[tuple[str, dict[str, Any]]]:
        self._index += 1
        self._open = "tool" if isinstance(part, ToolCall) else _field(part)
        block = {**_block(part), **({"signature": ""} if self._open == "thinking" else {})}
        return [("content_block_start", {"index": self._index, "content_block": block})]

    def _delta(self, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"index": self._index, "delta": delta}

    def _close(self) -> list[tuple[str, dict[str, Any]]]:
        if not self._open:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": SIGNATURE})] if self._open == "thinking" else []
        self._open = ""
        return [*signed, ("content_block_stop", {"index": self._index})]


def _field(part: TextPart) -> str:
    return "text" if part.channel == "content" else "thinking"


def _block(part: TextPart | ToolCall) -> dict[str, Any]:
    """Return the block that a part begins."""
    if isinstance(part, ToolCall):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    name = _field(part)
    return {"type": name, name: ""}


def _stop(finished: Finished) -> dict[str, Any]:
    reason = "stop_sequence" if finished.stop is not None else _REASONS.get(finished.reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": finished.stop}


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "input_tokens": finished.prompt_tokens - finished.cached_tokens, "output_tokens": finished.completion_tokens,
        "cache_creation_input_tokens": 0, "cache_read_input_tokens": finished.cached_tokens,
    }  # fmt: skip


def _events(*events: tuple[str, dict[str, Any]]) -> bytes:
    return b"".join(_lines(events))


def _lines(events: Iterable[tuple[str, dict[str, Any]]]) -> Iterable[bytes]:
    for name, value in events:
        data = json.dumps({"type": name, **value}, ensure_ascii=False, allow_nan=False)
        yield f"event: {name}\ndata: {data}\n\n".encode(errors="replace")

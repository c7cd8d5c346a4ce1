"""OpenAI's response format: complete answers and the chunks of streams, built from the parts of a generation."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .api_error import ApiError
from .generation import Finished, Generation
from .parts import (
    AnswerPart,
    Progress,
    TextPart,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients of server-sent events pass over."""


def event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode(errors="replace")


class OpenAIStream:
    """An answer of the chat or completions route, whole or in chunks."""

    def __init__(self, kind: "type[ChatFormat] | type[CompletionFormat]", model_id: str, generation: Generation):
        """Begin an answer.

        Args:
            kind: The route's format.
            model_id: The model's name.
            generation: The generation, whose request was read.
        """
        self._answer = kind(model_id, generation.request.top_logprobs is not None)
        self._usage = generation.request.include_usage
        self._calls = 0

    def whole(self, parts: Sequence[AnswerPart], finished: Finished) -> dict[str, Any]:
        """Return the complete answer."""
        return self._answer.whole(parts, finished)

    def start(self) -> bytes:
        """Return the chunks that precede the first token."""
        return b"".join(map(event, self._answer.first()))

    def part(self, part: AnswerPart) -> bytes:
        """Return the chunk of one part of the answer."""
        chunk = b"" if isinstance(part, ToolCallEnd) else event(self._answer.chunk(part, self._calls))
        self._calls += isinstance(part, ToolCall | ToolCallEnd)
        return chunk

    def silence(self) -> bytes:
        """Return what keeps the connection alive."""
        return KEEP_ALIVE

    def end(self, finished: Finished) -> bytes:
        """Return the chunks at the end."""
        usage = event(self._answer.usage(finished)) if self._usage else b""
        return event(self._answer.last(finished)) + usage + DONE

    def failed(self, error: ApiError) -> bytes:
        """Return the chunk of an error after the start."""
        return event(error.body)


@dataclass(frozen=True)
class ChatFormat:
    """Answers of /v1/chat/completions."""

    model_id: str
    logprobs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, parts: Sequence[AnswerPart], finished: Finished) -> dict[str, Any]:
        """Return the complete answer."""
        texts = [part for part in parts if isinstance(part, TextPart)]
        content = "".join(part.text for part in texts if part.channel == "content")
        reasoning = "".join(part.text for part in texts if part.channel == "reasoning")
        calls = [_call(call) for call in parts if isinstance(call, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _chat_logprobs([p for part in texts for p in part.logprobs]) if self.logprobs else None,
            "finish_reason": finished.reason,
        }
        return {**self._base("chat.completion"), "choices": [choice], "usage": _usage(finished)}

    def first(self) -> list[dict[str, Any]]:
        """Return the chunks that precede the first token."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunk(self, part: AnswerPart, index: int) -> dict[str, Any]:
        """Return the chunk of one part of the answer; ``index`` is the number of tool calls before it."""
        if isinstance(part, ToolCall):
            return self._chunk({"tool_calls": [{"index": index, **_call(part)}]})
        if isinstance(part, ToolCallStart):
            return self._chunk({"tool_calls": [{"index": index, **_call(ToolCall(part.name, "", part.id))}]})
        if isinstance(part, ToolCallDelta):
            return self._chunk({"tool_calls": [{"index": index, "function": {"arguments": part.arguments}}]})
        if isinstance(part, Progress):
            return {**self._chunk({}), "prompt_progress": _progress(part)}
        if not isinstance(part, TextPart):
            return self._chunk({})
        name = "content" if part.channel == "content" else "reasoning_content"
        return self._chunk({name: part.text}, part.logprobs)

    def last(self, finished: Finished) -> dict[str, Any]:
        """Return the chunk with the finish reason."""
        return self._chunk({}, reason=finished.reason)

    def usage(self, finished: Finished) -> dict[str, Any]:
        """Return the chunk that stream_options.include_usage asks for."""
        return {**self._base("chat.completion.chunk"), "choices": [], "usage": _usage(finished)}

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model_id}

    def _chunk(
        self, delta: dict[str, Any], logprobs: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> dict[str, Any]:
        shown = _chat_logprobs(logprobs) if self.logprobs and logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return {**self._base("chat.completion.chunk"), "choices": [choice]}


@dataclass
class CompletionFormat:
    """Answers of /v1/completions. One object per answer: in a stream, token offsets continue across chunks."""

    model_id: str
    logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _said: int = field(default=0, init=False)

    def whole(self, parts: Sequence[AnswerPart], finished: Finished) -> dict[str, Any]:
        """Return the complete answer."""
        texts = [part for part in parts if isinstance(part, TextPart)]
        logprobs = [p for part in texts for p in part.logprobs]
        body = self._body("".join(part.text for part in texts), logprobs, finished.reason)
        return {**body, "usage": _usage(finished)}

    def first(self) -> list[dict[str, Any]]:
        """Return nothing: a completion's first chunk is its first token."""
        return []

    def chunk(self, part: AnswerPart, index: int) -> dict[str, Any]:
        """Return the chunk of one part of the answer."""
        return self._body(part.text, part.logprobs, None) if isinstance(part, TextPart) else self._body("", (), None)

    def last(self, finished: Finished) -> dict[str, Any]:
        """Return the chunk with the finish reason."""
        return self._body("", (), finished.reason)

    def usage(self, finished: Finished) -> dict[str, Any]:
        """Return the chunk that stream_options.include_usage asks for."""
        return {**self._body("", (), None), "choices": [], "usage": _usage(finished)}

    def _body(self, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        shown = _completion_logprobs(logprobs, self._said) if self.logprobs else None
        self._said += len(text)
        choice = {"index": 0, "text": text, "logprobs": shown, "finish_reason": reason}
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model_id,
            "choices": [choice],
        }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _progress(progress: Progress) -> dict[str, int | None]:
    """Return it as llama.cpp's server has it, with an estimate."""
    remaining = progress.remaining_seconds
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": int(progress.seconds * 1000),
        "remaining_ms": None if remaining is None else int(remaining * 1000),
    }


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {**_token(p.text, p.logprob, p.data), "top_logprobs": [_token(*likely) for likely in p.top]}
            for p in logprobs
        ],
        "refusal": None,
    }


def _token(text: str, logprob: float, data: bytes) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _completion_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for p in logprobs:
        offsets.append(offset)
        offset += len(p.text)
    return {
        "tokens": [p.text for p in logprobs],
        "token_logprobs": [_finite(p.logprob) for p in logprobs],
        "top_logprobs": [{text: _finite(value) for text, value, _ in p.top} for p in logprobs],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """Return a finite log-probability: JSON has no infinity, and OpenAI sends -9999 for an impossible token."""
    return logprob if logprob > -9999.0 else -9999.0

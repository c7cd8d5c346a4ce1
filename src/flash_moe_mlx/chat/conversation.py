"""Conversation: messages, tool rounds and the prefix cache of a chat with a model. No terminal, no server."""

import itertools
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..runtime.generation import GenerationResponse, stream_generate
from ..runtime.prefix_cache import PrefixCache
from ..runtime.steps import LogitsProcessor, Sampler
from .answer import BadCall, Kind, Part, ThinkingBudget
from .calls import Call
from .dialect import dialect_of
from .ids import CallIds
from .mcp_tools import McpTool
from .prompt import chat_prompt
from .reader import AnswerReader, Piece
from .tools import Tool, ToolResult

REFUSED = "refused by the user"
INTERRUPTED = "interrupted by the user"
TOO_MANY = "too many tool calls in one turn"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    Attributes:
        id: Its number in the conversation, as text.
        name: The tool's name.
        arguments: Its arguments by name.
    """

    id: str
    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"{self.name}({', '.join(f'{k}={json.dumps(v, ensure_ascii=False)}' for k, v in self.arguments.items())})"
        )

    def message(self) -> dict[str, Any]:
        """Return the call in the form of an assistant's message."""
        return {"type": "function", "id": self.id, "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ToolOutcome:
    """The end of a call: its result, or why there is none."""

    call: ToolCall
    result: ToolResult


@dataclass(frozen=True)
class AnswerEnd:
    """The end of one generation: the last response has its figures, and ``finish_reason`` says why it ended."""

    response: GenerationResponse


Event = Part | ToolCall | ToolOutcome | AnswerEnd


@dataclass
class Conversation:
    """A chat: :meth:`send` a message, and get what happens until the model has answered, tool calls included.

    Example:
        >>> chat = Conversation(model, tokenizer, tools=load_tools("tools.py"), confirm=lambda call: True)
        >>> for event in chat.send("What is 17 * 25?"):
        ...     if isinstance(event, Part):
        ...         print(event.text, end="")

    Attributes:
        model: From :func:`flash_moe_mlx.load`.
        tokenizer: From :func:`flash_moe_mlx.load`; must have a chat template.
        system: The system prompt; empty for none.
        tools: Tools that the model may call.
        confirm: Asked before each call; a call that it refuses is not run, and the model is told so. None refuses
            every call.
        prefix_cache: Cache that saves the prefill of earlier turns.
        max_tokens: Maximum number of tokens of one answer; -1 for no limit.
        sampler: Sampler, as :func:`stream_generate` takes it.
        logits_processors: Logits processors, as :func:`stream_generate` takes them.
        thinking: Whether to ask templates that support thinking for it.
        thinking_budget: Maximum number of tokens of thinking in one answer; None for no limit.
        max_tool_rounds: Maximum number of rounds of tool calls in one turn.
        tool_timeout_seconds: Time limit of one call.
        max_tool_characters: Maximum number of characters of a call's result that the model sees.
        progress: Called with (prompt tokens processed, prompt tokens).
        messages: Everything said, without the system prompt, in the form that chat templates take.
    """

    model: Any
    tokenizer: Any
    system: str = ""
    tools: Sequence[Tool | McpTool] = ()
    confirm: Callable[[ToolCall], bool] | None = None
    prefix_cache: PrefixCache | None = None
    max_tokens: int = 2048
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    thinking: bool = True
    thinking_budget: int | None = None
    max_tool_rounds: int = 8
    tool_timeout_seconds: float = 30.0
    max_tool_characters: int = 8000
    progress: Callable[[int, int], None] | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokenizer.has_chat_template:
            raise RequestError("[Conversation] the tokenizer must have a chat template, got none. Use generate.")
        if self.tools and not dialect_of(self.tokenizer).has_calls:
            raise RequestError(
                "[tools] the model's template must know tool calls, got one that doesn't. Leave them out."
            )
        self._numbers = itertools.count(1)

    def send(self, text: str, schema: Any = None) -> Generator[Event, None, None]:
        """Send a message and yield events until the model has answered.

        If the iterator is closed or interrupted, the conversation keeps everything said until then.

        Args:
            text: The user's message.
            schema: A schema or grammar that the answer obeys, as in :func:`stream_generate`; not with tools.

        Yields:
            Part: Thinking and text, as they are generated.
            AnswerEnd: At the end of each generation.
            ToolCall: A call, before it is confirmed.
            ToolOutcome: Its result.

        Raises:
            RequestError: If the conversation has become longer than max_context, or the schema can't be used; the
                message is forgotten.
            MemoryLimitError: As :func:`stream_generate`.
            StoreError: As :func:`stream_generate`.
        """
        if schema is not None and self.tools:
            raise RequestError("[schema] must come without tools, got both: a call would not obey it. Leave one out.")
        self.messages.append({"role": "user", "content": text})
        for tool_round in range(1, self.max_tool_rounds + 2):
            answer = _Answer()
            try:
                yield from self._generate(answer, schema)
            finally:
                calls = self._keep(answer)
            yield from self._end(answer, calls, tool_round <= self.max_tool_rounds)
            if not answer.has_calls:
                return

    def prompt(self) -> tuple[list[int], list[int]]:
        """Return the conversation's tokens and the points at which to copy states; see :func:`chat_prompt`."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        schemas = [tool.schema for tool in self.tools] or None
        limit = self.model.streaming.max_context
        return chat_prompt(
            self.tokenizer,
            [*system, *self.messages],
            max_context=limit,
            tools=schemas,
            enable_thinking=self.thinking,
        )

    def _generate(self, answer: "_Answer", schema: Any) -> Generator[Event, None, None]:
        prompt, points = self.prompt()
        reader = AnswerReader(self.tokenizer, prompt, [tool.schema for tool in self.tools])
        processors = list(self.logits_processors)
        if self.thinking_budget is not None:
            processors.append(ThinkingBudget(self.tokenizer, prompt, self.thinking_budget))
        for response in stream_generate(
            self.model,
            self.tokenizer,
            prompt,
            self.max_tokens,
            sampler=self.sampler,
            logits_processors=processors,
            prefix_cache=self.prefix_cache,
            snapshot_at=points if self.prefix_cache is not None else None,
            prompt_progress_callback=self.progress,
            schema=schema,
        ):
            answer.response = response
            for piece in reader.feed(response.token, response.finish_reason):
                answer.pieces.append(piece)
                if isinstance(piece, Part):
                    yield piece

    def _keep(self, answer: "_Answer") -> list[ToolCall | str]:
        """Append the assistant's message. Returns its tool calls; for a malformed call, the error text."""
        text = answer.said("text").strip()
        calls: list[ToolCall | str] = []
        ids = CallIds.for_conversation(self.tokenizer, self.messages)
        for piece in answer.pieces:
            if isinstance(piece, Call):
                number = f"call_{next(self._numbers)}" if ids.style == "any" and piece.id is None else None
                calls.append(ToolCall(number or ids.of(piece), piece.name, piece.arguments))
            elif isinstance(piece, BadCall):
                calls.append(f"the call can't be read ({piece.reason}): {piece.text.strip()}")
        if not text and not calls:  # nothing was said: neither is what it would have answered
            if self.messages[-1]["role"] == "user":
                self.messages.pop()
            return []
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinking := answer.said("thinking").strip():
            message["reasoning_content"] = thinking
        if whole := [call.message() for call in calls if isinstance(call, ToolCall)]:
            message["tool_calls"] = whole
        self.messages.append(message)
        return calls

    def _end(self, answer: "_Answer", calls: list[ToolCall | str], allowed: bool) -> Generator[Event, None, None]:
        """Run the calls of an answer and add their results, whatever interrupts it."""
        left = list(calls)
        try:
            if answer.response is not None:
                yield AnswerEnd(answer.response)
            while left:
                call = left[0]
                if isinstance(call, str):
                    self._answer_call(left.pop(0), ToolResult(call, ok=False))
                    continue
                yield call
                result = self._run(call) if allowed else ToolResult(TOO_MANY, ok=False)
                self._answer_call(left.pop(0), result)
                yield ToolOutcome(call, result)
        finally:
            for call in left:
                self._answer_call(call, ToolResult(INTERRUPTED, ok=False))

    def _run(self, call: ToolCall) -> ToolResult:
        tool = next((tool for tool in self.tools if tool.name == call.name), None)
        if tool is None:
            names = ", ".join(tool.name for tool in self.tools)
            return ToolResult(f"there is no tool {call.name}, only {names}", ok=False)
        if self.confirm is None or not self.confirm(call):
            return ToolResult(REFUSED, ok=False)
        return tool.run(
            call.arguments, timeout_seconds=self.tool_timeout_seconds, max_characters=self.max_tool_characters
        )

    def _answer_call(self, call: ToolCall | str, result: ToolResult) -> None:
        content = result.text if result.ok else json.dumps({"error": result.text}, ensure_ascii=False)
        named = {"tool_call_id": call.id, "name": call.name} if isinstance(call, ToolCall) else {}
        self.messages.append({"role": "tool", **named, "content": content})


@dataclass
class _Answer:
    """One generation: its pieces, and its last response."""

    pieces: list[Piece] = field(default_factory=list)
    response: GenerationResponse | None = None

    def said(self, kind: Kind) -> str:
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Part) and piece.kind == kind)

    @property
    def has_calls(self) -> bool:
        return any(not isinstance(piece, Part) for piece in self.pieces)

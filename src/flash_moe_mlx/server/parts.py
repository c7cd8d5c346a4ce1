"""AnswerParser: a generated answer's parts as clients get them: content up to a stop string, reasoning, tool calls."""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..chat.answer import AnswerSplitter, Part
from ..chat.calls import NotACallError, read_calls
from .schema import GenerationRequest


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a generated token, and of the likeliest in its place: (text, log-probability) pairs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextPart:
    """More text of the answer, or of the thinking before it."""

    channel: Literal["content", "reasoning"]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call that the model makes. ``arguments`` is JSON, as OpenAI's clients want it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


AnswerPart = TextPart | ToolCall


class AnswerParser:
    """Feed it a token's text; it returns the parts that are certain.

    Text is held back while it could be the beginning of a stop string, or the white space before a tool call.
    A token's log-probability comes with the first of its text; those of tokens that yield no content (thinking, tool
    calls, a stop string) are dropped.

    Attributes:
        stopped: A stop string was found, or the only call allowed is made: nothing more is wanted.
        calls: Tool calls so far.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], request: GenerationRequest):
        """Begin an answer.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`.
            prompt: The prompt's tokens; with ``call_required`` they end with a tool call's beginning.
            request: What is asked for.
        """
        self.stopped = False
        self.calls = 0
        self._tokenizer = tokenizer
        self._request = request
        self._splitter: AnswerSplitter | None = None  # a plain completion is text throughout
        if request.messages is not None:
            required = request.call_required
            self._splitter = AnswerSplitter(tokenizer, () if required else prompt, tool_calls=bool(request.tools))
            if required:
                list(self._splitter.feed(tokenizer.tool_call_start))
        self._held = ""
        self._fed = 0
        self._unplaced: list[tuple[int, int, TokenLogprob]] = []  # by where in all that was fed their text begins, ends
        self._placed: list[tuple[int, TokenLogprob]] = []  # by where in what is held it begins

    def feed(self, text: str, logprob: TokenLogprob | None = None, last: bool = False) -> list[AnswerPart]:
        """Take the text of one token, which may be empty. The ``last`` one lets go of what is held back."""
        if logprob is not None:
            self._unplaced.append((self._fed, self._fed + len(text), logprob))
        pieces = [Part("text", text, self._fed)] if self._splitter is None else self._splitter.feed(text, last=last)
        self._fed += len(text)
        parts: list[AnswerPart] = []
        for piece in pieces:
            if self.stopped:
                break
            if piece.kind == "text":
                self._place(piece)
                parts += self._content(piece.text)
            elif piece.kind == "thinking":
                parts.append(TextPart("reasoning", piece.text))
            else:
                parts += self._call(piece.text)
        if last and not self.stopped:
            parts += self._release(len(self._held))
        return parts

    def _content(self, text: str) -> Iterator[AnswerPart]:
        self._held += text
        stops = [found for stop in self._request.stop if (found := self._held.find(stop)) >= 0]
        if stops:
            self.stopped = True
            yield from self._release(min(stops))
        else:
            yield from self._release(len(self._held) - self._uncertain())

    def _place(self, piece: Part) -> None:
        """Find the tokens that a piece of content comes from; those before it have none."""
        end = piece.start + len(piece.text)
        for first, last, logprob in self._unplaced:
            if first < end and (last > piece.start or first == piece.start):
                self._placed.append((len(self._held) + max(0, first - piece.start), logprob))
        self._unplaced = [token for token in self._unplaced if token[0] >= end]

    def _uncertain(self) -> int:
        """Characters at the end of what is held that may not be content."""
        held = self._held
        longest = 0
        for stop in self._request.stop:
            sizes = range(min(len(stop) - 1, len(held)), longest, -1)
            longest = next((size for size in sizes if held.endswith(stop[:size])), longest)
        if self._request.tools:
            longest = len(held) - len(held[: len(held) - longest].rstrip())
        return longest

    def _release(self, size: int) -> Iterator[AnswerPart]:
        text, self._held = self._held[:size], self._held[size:]
        logprobs = tuple(logprob for position, logprob in self._placed if position < size)
        self._placed = [(position - size, logprob) for position, logprob in self._placed if position >= size]
        if text:
            yield TextPart("content", text, logprobs)

    def _call(self, text: str) -> Iterator[AnswerPart]:
        calls = self._parsed(text)
        if calls is None:  # told as it stands rather than lost
            self._held += self._tokenizer.tool_call_start + text
            yield from self._release(len(self._held))
            return
        yield from self._release(len(self._held.rstrip()))
        self._held = ""
        self._placed.clear()
        if not self._request.parallel_tool_calls:
            calls, self.stopped = calls[:1], True
        self.calls += len(calls)
        yield from calls

    def _parsed(self, text: str) -> list[ToolCall] | None:
        try:
            calls = read_calls(self._tokenizer.tool_parser, text, self._request.tools)
        except NotACallError:
            return None
        return [ToolCall(call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in calls]

"""AnswerParser: splits a generated answer into content (up to a stop string), reasoning and tool calls for clients."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..chat.answer import BadCall, Part
from ..chat.calls import Call
from ..chat.ids import CallIds
from ..chat.partial import CallBegun, CallText
from ..chat.reader import AnswerReader, Piece
from ..chat.text import AnswerText
from .schema import GenerationRequest


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a generated token, and of the likeliest tokens at its position.

    Attributes:
        text: Text that the token adds to the answer.
        logprob: Its log-probability.
        top: The likeliest tokens: (text, log-probability, bytes).
        data: Bytes of the token.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float, bytes], ...] = ()
    data: bytes = b""


@dataclass(frozen=True)
class TextPart:
    """More text of the answer, or of the thinking before it."""

    channel: Literal["content", "reasoning"]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call made by the model. ``arguments`` is JSON text, as OpenAI's clients expect."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True)
class ToolCallStart:
    """The beginning of a call that comes piece by piece, as calls do in streams."""

    name: str
    id: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of the JSON text of the arguments of the call that was begun."""

    arguments: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The end of the call that was begun.

    Attributes:
        call: The call, with the arguments that were sent.
        whole: Whether these are all; otherwise the answer was cut, or the model wrote no call.
    """

    call: ToolCall
    whole: bool


@dataclass(frozen=True)
class Progress:
    """How much of the prompt was read.

    Attributes:
        total: Tokens of the prompt.
        processed: Tokens read so far.
        cached: Tokens of which the prefix cache had the state.
        seconds: Time since reading began.
    """

    total: int
    processed: int
    cached: int
    seconds: float

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate of the time until the prompt is read, at the speed so far; None before anything was computed."""
        computed = self.processed - self.cached
        return self.seconds * (self.total - self.processed) / computed if computed > 0 else None


AnswerPart = TextPart | ToolCall | ToolCallStart | ToolCallDelta | ToolCallEnd | Progress


class AnswerParser:
    """Takes an answer token by token, and returns the parts that are certain.

    Text is held back while it could be the beginning of a stop string, or the white space before a tool call.
    A token's log-probability comes with the first of its text; those of tokens that yield no content (thinking, tool
    calls, a stop string) are dropped.

    Attributes:
        stopped: Whether the answer is complete: a stop string was found, or the only call allowed was made.
        calls: Tool calls so far.
        text: The text of the last token.
        stop: The stop string that was found; None if there was none.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], request: GenerationRequest, ids: CallIds | None = None):
        """Start an answer.

        Args:
            tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
            prompt: The prompt's tokens; with ``call_required`` they end with the beginning of a tool call.
            request: The request.
            ids: Generator of the calls' ids.
        """
        self.stopped = False
        self.calls = 0
        self.text = ""
        self.stop: str | None = None
        self._request = request
        self._ends = getattr(tokenizer, "eos_token_ids", ())
        self._ids = CallIds() if ids is None else ids
        self._reader: AnswerReader | None = None
        self._plain: AnswerText | None = None  # a plain completion is all text, and continues the prompt
        if request.messages is None:
            self._plain = AnswerText(tokenizer, prompt)
        else:
            self._reader = AnswerReader(
                tokenizer, prompt, request.tools, called=request.call_required, partial=request.stream
            )
        self._begun: ToolCall | None = None  # the call that is being sent
        self._held = ""
        self._fed = 0
        self._unplaced: list[tuple[int, int, TokenLogprob]] = []  # keyed by start and end in the text fed so far
        self._placed: list[tuple[int, TokenLogprob]] = []  # keyed by start in the text held back

    def read(self, token: int, finish_reason: str | None = None) -> list[Piece]:
        """Take a token, and return its pieces for :meth:`feed`, which places its log-probability."""
        if self._reader is not None:
            pieces = self._reader.feed(token, finish_reason)
            self.text = self._reader.said
            return pieces
        assert self._plain is not None
        self.text = "" if token in self._ends else self._plain.piece(token)
        return [Part("text", self.text, self._fed, len(self.text))]

    def feed(
        self, pieces: Sequence[Piece], logprob: TokenLogprob | None = None, last: bool = False
    ) -> list[AnswerPart]:
        """Take the pieces of one token, and return the parts that are certain; ``last`` releases all held text."""
        size = self._fed + len(self.text) if self._reader is None else self._reader.size
        if logprob is not None:
            self._unplaced.append((self._fed, size, logprob))
        self._fed = size
        parts: list[AnswerPart] = []
        for piece in pieces:
            if self.stopped:
                break
            if isinstance(piece, CallBegun):
                parts += self._begin(piece.call)
            elif isinstance(piece, CallText):
                parts += self._send(piece.text)
            elif isinstance(piece, Call):
                parts += self._call(piece)
            else:
                parts += self._end(whole=False)  # it was none, or was cut
                parts += self._words(piece)
        if last and not self.stopped:
            parts += self._end(whole=False)
            parts += self._release(len(self._held))
        return parts

    def _words(self, piece: Part | BadCall) -> Iterator[AnswerPart]:
        if isinstance(piece, BadCall):  # returned as text with a note, rather than lost
            yield from self._content(f"{piece.text}\n[This is no call that can be run: {piece.reason}.]")
        elif piece.kind == "text":
            self._place(piece)
            yield from self._content(piece.text)
        elif piece.text:
            yield TextPart("reasoning", piece.text)

    def _content(self, text: str) -> Iterator[AnswerPart]:
        self._held += text
        stops = [(found, stop) for stop in self._request.stop if (found := self._held.find(stop)) >= 0]
        if stops:
            self.stopped = True
            position, self.stop = min(stops)
            yield from self._release(position)
        else:
            yield from self._release(len(self._held) - self._uncertain())

    def _place(self, piece: Part) -> None:
        """Assign tokens to a piece of content; tokens before it belong to no content."""
        end = piece.start + piece.size
        for first, last, logprob in self._unplaced:
            if first < end and (last > piece.start or first == piece.start):
                self._placed.append((len(self._held) + max(0, first - piece.start), logprob))
        self._unplaced = [token for token in self._unplaced if token[0] >= end]

    def _uncertain(self) -> int:
        """Return the number of characters at the end of the held text that may begin a stop string."""
        held, longest = self._held, 0
        for stop in self._request.stop:
            sizes = range(min(len(stop) - 1, len(held)), longest, -1)
            longest = next((size for size in sizes if held.endswith(stop[:size])), longest)
        return longest

    def _release(self, size: int) -> Iterator[AnswerPart]:
        text, self._held = self._held[:size], self._held[size:]
        logprobs = tuple(logprob for position, logprob in self._placed if position < size)
        self._placed = [(position - size, logprob) for position, logprob in self._placed if position >= size]
        if text:
            yield TextPart("content", text, logprobs)

    def _call(self, call: Call) -> Iterator[AnswerPart]:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        begun = self._begun
        if begun is not None and begun.name == call.name and arguments.startswith(begun.arguments):
            yield from self._send(arguments[len(begun.arguments) :])
            yield from self._end(whole=True)
        else:
            yield from self._end(whole=False)
            yield from self._before_call()
            yield ToolCall(call.name, arguments, self._ids.of(call))
        self.stopped = not self._request.parallel_tool_calls

    def _before_call(self) -> Iterator[AnswerPart]:
        yield from self._release(len(self._held))
        self._placed.clear()
        self.calls += 1

    def _begin(self, call: Call) -> Iterator[AnswerPart]:
        yield from self._before_call()
        self._begun = ToolCall(call.name, "", self._ids.of(call))
        yield ToolCallStart(call.name, self._begun.id)

    def _send(self, text: str) -> Iterator[AnswerPart]:
        if text and self._begun is not None:
            self._begun = replace(self._begun, arguments=self._begun.arguments + text)
            yield ToolCallDelta(text)

    def _end(self, *, whole: bool) -> Iterator[AnswerPart]:
        begun, self._begun = self._begun, None
        if begun is not None:
            yield ToolCallEnd(begun, whole)

"""An answer while it is generated: what of it is thinking, text and tool calls; and a bound on the thinking."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

from ..errors import RequestError

_TAIL = 16  # tokens of the generation prompt in which a template opens or closes the thinking

Kind = Literal["thinking", "text", "tool_call"]


@dataclass(frozen=True)
class Part:
    """A piece of an answer. Thinking and text come as they are generated, a tool call's text when it is whole.

    ``start`` is where it begins in all that was fed.
    """

    kind: Kind
    text: str
    start: int = field(default=0, compare=False)


class AnswerSplitter:
    """Tells thinking, text and tool calls apart by the tokenizer's markers, which are left out.

    Example:
        >>> splitter = AnswerSplitter(tokenizer, prompt)
        >>> for response in stream_generate(model, tokenizer, prompt):
        ...     for part in splitter.feed(response.text, last=response.finish_reason is not None):
        ...         print(part.kind, part.text)
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), *, tool_calls: bool = True):
        """Begin an answer.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`.
            prompt: The prompt's tokens: templates may open the thinking there.
            tool_calls: Whether to look for tool calls; without, they are text.
        """
        self._kind: Kind = "thinking" if begins_thinking(tokenizer, prompt) else "text"
        self._held = ""
        self._start = 0  # of what is held, in all that was fed
        self._strip = False
        self._markers: dict[Kind, list[tuple[str, Kind]]] = {"text": [], "thinking": [], "tool_call": []}
        if tokenizer.has_thinking:
            self._markers["text"].append((tokenizer.think_start, "thinking"))
            self._markers["thinking"].append((tokenizer.think_end, "text"))
        if tool_calls and tokenizer.has_tool_calling:
            self._markers["text"].append((tokenizer.tool_call_start, "tool_call"))
            if tokenizer.tool_call_end:  # without one, a call goes on to the answer's end
                self._markers["tool_call"].append((tokenizer.tool_call_end, "text"))

    def feed(self, text: str, last: bool = False) -> Iterator[Part]:
        """Parts that are certain now. What may be the beginning of a marker is held until it is or is not one."""
        self._held += text
        while found := self._find_marker():
            position, marker, kind = found
            yield from self._part(self._held[:position])
            self._drop(position + len(marker))
            self._strip, self._kind = True, kind
        if self._kind != "tool_call" or last:
            certain = len(self._held) if last else len(self._held) - self._beginning_of_marker()
            yield from self._part(self._held[:certain])
            self._drop(certain)

    def _drop(self, size: int) -> None:
        self._held, self._start = self._held[size:], self._start + size

    def _find_marker(self) -> tuple[int, str, Kind] | None:
        found = [(self._held.find(marker), marker, kind) for marker, kind in self._markers[self._kind]]
        return min((f for f in found if f[0] >= 0), default=None)

    def _beginning_of_marker(self) -> int:
        """Characters at the end of what is held that a marker begins with."""
        longest = max((len(marker) for marker, _ in self._markers[self._kind]), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(marker.startswith(self._held[-size:]) for marker, _ in self._markers[self._kind]):
                return size
        return 0

    def _part(self, text: str) -> Iterator[Part]:
        end = self._start + len(text)
        if self._strip:  # the line ends between a marker and what follows are the template's
            text = text.lstrip("\n")
        if text:
            self._strip = False
            yield Part(self._kind, text, end - len(text))


def begins_thinking(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether the end of the prompt opens the thinking, as the templates of thinking models do."""
    if not tokenizer.has_thinking or not len(prompt):
        return False
    tail = list(prompt[-_TAIL:])
    return bool(tokenizer.rfind_think_start(tail) > tokenizer.rfind_think_end(tail))


class ThinkingBudget:
    """A logits processor that ends the thinking after a number of tokens. One object serves one generation."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], max_tokens: int):
        """Begin an answer.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`.
            prompt: The prompt's tokens.
            max_tokens: Most tokens of thinking.

        Raises:
            RequestError: If ``max_tokens`` is negative.
        """
        if max_tokens < 0:
            raise RequestError(f"[thinking_budget] must be a number of tokens from 0, got {max_tokens}. Leave it out.")
        self._start = list(tokenizer.think_start_tokens or ())
        self._end = list(tokenizer.think_end_tokens or ())
        self._left = max_tokens
        self._thinking = begins_thinking(tokenizer, prompt)
        self._recent: list[int] | None = None  # None before the first token of the answer
        self._forced = 0

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits as they are, or such that the end of the thinking follows. Shape (1, vocabulary)."""
        if not self._end:
            return logits
        if self._recent is None:
            self._recent = []
        else:
            self._note(int(tokens[-1].item()))
        if not self._thinking or self._left > 0:
            return logits
        forced = self._end[min(self._forced, len(self._end) - 1)]
        self._forced += 1
        return mx.where(mx.arange(logits.shape[-1]) == forced, logits, -mx.inf)

    def _note(self, token: int) -> None:
        longest = max(len(self._start), len(self._end))
        self._recent = [*(self._recent or []), token][-longest:]
        if self._thinking and self._recent[-len(self._end) :] == self._end:
            self._thinking = False
        elif not self._thinking and self._recent[-len(self._start) :] == self._start:
            self._thinking, self._forced = True, 0
        elif self._thinking:
            self._left -= 1

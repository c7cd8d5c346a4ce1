"""Grammars of the tool calls that models write, one per set of markers.

mlx_lm's parsers get the text between two markers and apply regular expressions. Here a grammar reads until its own end,
so that an end marker inside a string is part of the string, a block may hold several calls, and a call that was cut off
is recognised.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .calls import Call, NotACallError, checked_call, read_calls
from .coercion import coerce_text, coerce_value, parameters_of
from .notation import Head, UnfinishedError, json_at, json_head, skip_space
from .symbols import Symbols

Tools = Sequence[Mapping[str, Any]] | None

_OBJECT = re.compile(r'\s*\[?\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_PROSE = re.compile(r"\s*(?:[`'\")*,.;:!?]|\w[\w-]*[ ,;:!?`'\")])")
"""Text after a marker that the model only mentions."""


@dataclass(frozen=True)
class Block:
    """Calls that were read, and where they end in the text that was looked at."""

    calls: list[Call]
    end: int


@dataclass(frozen=True)
class CallSyntax:
    """One way to write calls. Subclasses read it.

    Attributes:
        symbols: Symbols that stand for its markers.
        opening: Marker that begins a block of calls.
        closing: Marker that ends a block; empty if only the answer's end does.
        bare: Texts that begin a call without the opening marker.
        tools: Tools that may be called.
    """

    symbols: Symbols
    opening: str
    closing: str
    bare: tuple[str, ...] = ()
    tools: Tools = None

    @property
    def ends(self) -> tuple[str, ...]:
        """Marks at which a block may be whole."""
        return (self.symbols[self.closing],) if self.closing else ()

    def spoken_of(self, block: str) -> bool:
        """Return whether the text after an opening marker shows that the model only mentions it."""
        return _PROSE.match(block) is not None

    def is_bare(self, opening: str) -> bool:
        """Return whether a call begins without its opening marker."""
        return opening in map(self.symbols.__getitem__, self.bare)

    def calls_no_tool(self, block: str) -> bool:
        """Return whether the text after a bare beginning shows that none of the tools is called."""
        return False

    @property
    def names(self) -> set[str]:
        """Names of the tools."""
        return {str(tool.get("function", tool).get("name")) for tool in self.tools or ()}

    def read(self, block: str, opening: str) -> Block:
        """Read calls from the beginning of what follows an opening.

        Args:
            block: What was said after it so far, with symbols in place of markers.
            opening: The opening, as the model wrote it.

        Raises:
            UnfinishedError: If the calls continue beyond it.
            NotACallError: If they are no calls, whatever follows.
        """
        raise NotImplementedError

    def finish(self, block: str, opening: str) -> Block:
        """Read calls from an answer that ended without their closing marker. Raises as :meth:`read`."""
        whole = self.read(block + self.symbols[self.closing], opening)
        return Block(whole.calls, min(whole.end, len(block)))

    def head(self, text: str, *, bare: bool) -> Head | None:
        """Return the head of the first call, or None until its arguments have begun.

        Args:
            text: What was said after the opening marker, or from a bare beginning on.
            bare: Whether it has no opening marker.

        Raises:
            NotACallError: If there is none, whatever follows.
        """
        return None

    def object_head(self, text: str, position: int) -> Head | None:
        """Return the head of a call that is a JSON object, alone or in a list."""
        found = _OBJECT.match(text, position)
        return found and json_head(self.call(json.loads(found.group(1), strict=False), {}), text, found.end())

    def call(self, name: Any, arguments: Any, call_id: Any = None) -> Call:
        """Return a call that can be sent, its arguments in the types of the tool's schema."""
        name = self.symbols.text(name).strip() if isinstance(name, str) else name
        if isinstance(name, str) and name not in self.names and name.removeprefix("functions.") in self.names:
            name = name.removeprefix("functions.")
        call_id = self.symbols.text(call_id) if isinstance(call_id, str) else None
        call = checked_call(name, self.symbols.value(arguments), call_id)
        schema = parameters_of(self.tools, call.name)
        typed = {key: coerce_value(value, key, schema) for key, value in call.arguments.items()}
        return checked_call(call.name, typed, call.id)

    def written_call(self, name: str, arguments: Mapping[str, str]) -> Call:
        """Return a call whose arguments the model wrote as text."""
        name = self.symbols.text(name).strip()
        schema = parameters_of(self.tools, name)
        texts = {self.symbols.text(key).strip(): self.symbols.text(text) for key, text in arguments.items()}
        return self.call(name, {key: coerce_text(text, key, schema) for key, text in texts.items()})

    def object_calls(self, value: Any) -> list[Call]:
        """Return the calls of a JSON object, or of a list of them."""
        if isinstance(value, list) and value:
            return [call for item in value for call in self.object_calls(item)]
        if not isinstance(value, Mapping):
            raise NotACallError("a call must have a name and arguments by name")
        if isinstance(function := value.get("function"), Mapping):
            value = {"id": value.get("id"), **function}
        name = value.get("name", value.get("function", value.get("tool")))
        return [self.call(name, value.get("arguments", value.get("parameters")), value.get("id"))]

    def after(self, block: str, position: int, calls: list[Call]) -> Block:
        """Return the block that ends with calls that were read up to a position: at its closing marker, if any."""
        position = skip_space(block, position)
        closing = self.symbols[self.closing]
        if not closing:
            return Block(calls, position)
        if position == len(block):
            raise UnfinishedError
        if (found := block.find(closing, position)) >= 0:
            return Block(calls, found + len(closing))
        raise UnfinishedError


@dataclass(frozen=True)
class SectionSyntax(CallSyntax):
    """Calls in a section, each with markers of its own: Kimi K2's and DeepSeek's.

    Attributes:
        begin: The marker before a call.
        separator: The marker before its arguments.
        end: The marker after it.
    """

    begin: str = ""
    separator: str = ""
    end: str = ""

    @property
    def ends(self) -> tuple[str, ...]:
        """Marks at which a block may be whole."""
        return (self.symbols[self.closing], self.symbols[self.end])

    def read(self, block: str, opening: str) -> Block:
        """Read calls up to the section's end; without the section's beginning, up to other text."""
        begin, end, closing = (self.symbols[m] for m in (self.begin, self.end, self.closing))
        bare = self.is_bare(opening)
        text = begin + block if bare else block
        shift = len(text) - len(block)
        calls: list[Call] = []
        position = skip_space(text, 0)
        while text.startswith(begin, position):
            call, position = self._item(text, position + len(begin))
            calls.append(call)
            position = skip_space(text, position)
            if text.startswith(end, position):
                position = skip_space(text, position + len(end))
        if position >= len(text):
            raise UnfinishedError
        if not calls and not text.startswith(closing, position):
            raise NotACallError("a section must hold calls")
        if bare:
            return Block(calls, (position + len(closing) if text.startswith(closing, position) else position) - shift)
        return self.after(text, position, calls)

    def head(self, text: str, *, bare: bool) -> Head | None:
        """Return the head of the section's first call."""
        begin, separator = self.symbols[self.begin], self.symbols[self.separator]
        position = skip_space(text, 0)
        if not text.startswith(begin, position) or (found := text.find(separator, position)) < 0:
            return None
        header = self.symbols.text(text[position + len(begin) : found]).strip()
        position = skip_space(text, found + len(separator))
        if fenced := _FENCED.match(text, position):
            return json_head(self.call(fenced.group(1), {}), text, fenced.end())
        if not text.startswith("{", position):
            return None
        return json_head(self._headed(header, {}), text, position)

    def _headed(self, header: str, arguments: Any) -> Call:
        if numbered := _NUMBERED.fullmatch(header):
            return self.call(numbered.group(1), arguments, header)
        return self.call(header, arguments)

    def _item(self, text: str, position: int) -> tuple[Call, int]:
        separator = self.symbols[self.separator]
        if (found := text.find(separator, position)) < 0:
            raise UnfinishedError
        header = self.symbols.text(text[position:found]).strip()
        position = skip_space(text, found + len(separator))
        if fenced := _FENCED.match(text, position):  # DeepSeek V3 and R1: the name and fenced JSON
            arguments, position = json_at(text, fenced.end())
            closing = _FENCE.match(text, position)
            return self.call(fenced.group(1), arguments), position if closing is None else closing.end()
        arguments, position = json_at(text, position)
        return self._headed(header, arguments), position


_FENCED = re.compile(r"([\w.-]+)\s*```(?:json)?\s*")
_FENCE = re.compile(r"\s*```")
_NUMBERED = re.compile(r"(?:functions\.)?(.+):\d+", re.DOTALL)


@dataclass(frozen=True)
class MistralSyntax(CallSyntax):
    """Mistral's calls: a JSON list, or names with arguments, up to the end of the answer."""

    def read(self, block: str, opening: str) -> Block:
        """Read calls that other text follows."""
        found = self._sequence(block)
        if found.end == len(block):
            raise UnfinishedError
        return found

    def finish(self, block: str, opening: str) -> Block:
        """Read calls up to the answer's end."""
        return self._sequence(block)

    def head(self, text: str, *, bare: bool) -> Head | None:
        """Return the head of the first call."""
        position = skip_space(text, 0)
        if named := self._header.match(text, position):
            return json_head(self.call(named.group(1), {}, named.group(2)), text, named.end())
        return self.object_head(text, position)

    @property
    def _header(self) -> "re.Pattern[str]":
        call_id, marker = (re.escape(self.symbols[m]) for m in ("[CALL_ID]", "[ARGS]"))
        return re.compile(rf"([\w./-]+)\s*(?:{call_id}\s*([\w-]+)\s*)?(?:{marker}\s*)?(?=\{{)")

    def _sequence(self, block: str) -> Block:
        """Read lists and named calls, which may each have the opening marker again."""
        header = self._header
        calls: list[Call] = []
        position = skip_space(block, 0)
        while position < len(block):
            if block.startswith(self.symbols[self.opening], position):
                position += len(self.symbols[self.opening])
            elif block[position] in "[{":
                value, position = json_at(block, position)
                calls += self.object_calls(value)
            elif named := header.match(block, position):
                arguments, position = json_at(block, named.end())
                calls.append(self.call(named.group(1), arguments, named.group(2)))
            elif calls:
                return Block(calls, position)
            elif _NO_ARGUMENTS_YET.fullmatch(block, position):
                raise UnfinishedError
            else:
                raise NotACallError("a call must have a name and arguments by name")
            position = skip_space(block, position)
        if not calls:
            raise UnfinishedError
        return Block(calls, position)


_NO_ARGUMENTS_YET = re.compile(r"[\w./-]*[^\w{]{0,12}[\w-]{0,64}[^\w{]{0,12}")


@dataclass(frozen=True)
class ForeignSyntax(CallSyntax):
    """Calls that a parser of mlx_lm's reads from what is between two markers.

    Attributes:
        parser: The parser.
    """

    parser: Callable[[str, Any], Any] = field(default=lambda text, tools: [])

    def read(self, block: str, opening: str) -> Block:
        """Hand the parser what comes before the closing marker."""
        closing = self.symbols[self.closing]
        found = block.find(closing) if closing else -1
        if found < 0:
            raise UnfinishedError
        return Block(self.parsed(block[:found]), found + len(closing))

    def parsed(self, body: str) -> list[Call]:
        """Return the calls of a whole body."""
        return [
            self.call(c.name, c.arguments, c.id) for c in read_calls(self.parser, self.symbols.text(body), self.tools)
        ]

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

from .calls import Call, NotACallError, checked_call, mend_pairs, read_calls
from .coercion import coerce_text, coerce_value, parameters_of
from .symbols import Symbols

Tools = Sequence[Mapping[str, Any]] | None

_SPACE = re.compile(r"\s*")
_PROSE = re.compile(r"\s*(?:[`'\")*,.;:!?]|\w[\w-]*[ ,;:!?`'\")])")
"""Text after a marker that the model only mentions."""


class UnfinishedError(Exception):
    """A call isn't complete in the text so far.

    Attributes:
        in_string: Whether it ends inside a JSON string, so that no marker in the text that follows ends the call.
    """

    def __init__(self, *, in_string: bool = False):
        super().__init__()
        self.in_string = in_string


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


def skip_space(text: str, position: int) -> int:
    """Return where the white space at a position ends."""
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


def json_at(text: str, position: int) -> tuple[Any, int]:
    """Read a JSON value; returns it and where it ends.

    Raises:
        UnfinishedError: If the text ends inside it.
        NotACallError: If it is none.
    """
    try:
        return _DECODER.raw_decode(mend_pairs(text), position)
    except json.JSONDecodeError as error:
        in_string = error.msg.startswith("Unterminated string")
        if in_string or error.pos >= len(text):
            raise UnfinishedError(in_string=in_string) from error
        raise NotACallError(f"arguments must be JSON, got {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise NotACallError(f"arguments must be JSON, got {error}") from error


def _refuse(constant: str) -> Any:
    raise NotACallError(f"arguments must be JSON, got {constant}")


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Keep the first of values with the same name: streams have sent it when the others come."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        members.setdefault(name, value)
    return members


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse, object_pairs_hook=_first_of_each)


@dataclass(frozen=True)
class XmlForm:
    """Markup of functions and their parameters.

    Attributes:
        function: The beginning of a function; its group is the name.
        parameter: The beginning of a parameter; its group is the name.
        parameter_end: The end of a parameter.
        function_end: The end of a function.
        lines: Whether a line end after the beginning of a value and one before its end are not part of it.
    """

    function: "re.Pattern[str]"
    parameter: "re.Pattern[str]"
    parameter_end: str
    function_end: str
    lines: bool


QWEN_XML = XmlForm(
    re.compile(r"<function=\s*([^<>\n]*?)\s*>"), re.compile(r"<parameter=\s*([^<>\n]*?)\s*>"),
    "</parameter>", "</function>", True,
)  # fmt: skip
MINIMAX_XML = XmlForm(
    re.compile(r"<invoke name=\s*[\"']?([^<>\"'\n]*)[\"']?\s*>"),
    re.compile(r"<parameter name=\s*[\"']?([^<>\"'\n]*)[\"']?\s*>"), "</parameter>", "</invoke>", False,
)  # fmt: skip


_BARE_NAME = re.compile(r"\s*[\"']?([^<>\"'\n]*?)[\"']?\s*>")


@dataclass(frozen=True)
class XmlSyntax(CallSyntax):
    """Calls marked up as functions with parameters: Qwen3-Coder's, Qwen3.5's and MiniMax M2's.

    Attributes:
        form: How they are marked up.
    """

    form: XmlForm = QWEN_XML

    @property
    def ends(self) -> tuple[str, ...]:
        """Marks at which a block may be whole."""
        return (*super().ends, self.form.function_end)

    def calls_no_tool(self, block: str) -> bool:
        """Return whether a name that is none of the tools' follows, or none at all."""
        name = _BARE_NAME.match(block)
        return len(block) > 80 if name is None else name.group(1) not in self.names

    def read(self, block: str, opening: str) -> Block:
        """Read functions up to the closing marker, or up to other text where there was no opening marker."""
        bare = self.is_bare(opening)
        text = opening + block if bare else block
        shift = len(text) - len(block)
        closing = self.symbols[self.closing]
        calls: list[Call] = []
        position = skip_space(text, 0)
        while begin := self.form.function.match(text, position):
            call, position = self._function(text, begin, closing, bare)
            calls.append(call)
            position = skip_space(text, position)
        if position == len(text):
            raise UnfinishedError
        if not calls:
            tag = self.form.function.pattern.split("=")[0]
            rest = text[position:]
            if closing not in text and (rest.startswith(tag) or tag.startswith(rest)):
                raise UnfinishedError
            raise NotACallError("a function must have a name")
        if bare:
            end = position + len(closing) if text.startswith(closing, position) else position
            return Block(calls, end - shift)
        return self.after(text, position, calls)

    def _function(self, text: str, begin: "re.Match[str]", closing: str, bare: bool) -> tuple[Call, int]:
        ending = self._ending(closing, bare)
        arguments: dict[str, str] = {}
        position = begin.end()
        while True:
            position = skip_space(text, position)
            if parameter := self.form.parameter.match(text, position):
                start = parameter.end()
                if (end := ending.search(text, start)) is None:
                    raise UnfinishedError
                value = text[start : end.start()]
                arguments.setdefault(parameter.group(1), value.removeprefix("\n") if self.form.lines else value)
                position = end.end()
            elif text.startswith(self.form.function_end, position):
                return self.written_call(begin.group(1), arguments), position + len(self.form.function_end)
            elif text.startswith(closing, position) and closing:
                return self.written_call(begin.group(1), arguments), position
            elif closing and text.find(closing, position) >= 0:
                raise NotACallError("a function must hold parameters alone")
            else:
                raise UnfinishedError

    def _ending(self, closing: str, bare: bool) -> "re.Pattern[str]":
        """Return what ends a value: the end of a parameter, where another one or the function's end follows."""
        return self._end_before("" if bare else rf"\s*(?:{re.escape(closing)}|{self.form.function.pattern}|\Z)")

    @property
    def certain_ending(self) -> "re.Pattern[str]":
        """What ends a value whatever follows in the block."""
        closing = re.escape(self.symbols[self.closing])
        return self._end_before(rf"\s*(?:{closing}|{self.form.function.pattern})")

    def _end_before(self, follows: str) -> "re.Pattern[str]":
        end, last = re.escape(self.form.parameter_end), re.escape(self.form.function_end) + follows
        lines = r"\n?" if self.form.lines else ""
        return re.compile(rf"{lines}{end}(?=\s*(?:{self.form.parameter.pattern}|{last}))")


@dataclass(frozen=True)
class TaggedSyntax(XmlSyntax):
    """Calls between ``<tool_call>`` and ``</tool_call>``: JSON objects (Qwen3, Hermes) or functions (Qwen3-Coder)."""

    def read(self, block: str, opening: str) -> Block:
        """Read JSON or functions, whichever the block begins with."""
        position = skip_space(block, 0)
        if not self.is_bare(opening) and block[position : position + 1] in ("{", "["):
            return self._objects(block, position)
        return super().read(block, opening)

    def _objects(self, block: str, position: int) -> Block:
        calls: list[Call] = []
        while block[position : position + 1] in ("{", "["):
            value, position = json_at(block, position)
            calls += self.object_calls(value)
            position = skip_space(block, position)
            if block[position : position + 1] in (",", ";"):
                position = skip_space(block, position + 1)
        return self.after(block, position, calls)


@dataclass(frozen=True)
class PairSyntax(CallSyntax):
    """GLM's calls: a name, then keys and values between markers of their own."""

    def read(self, block: str, opening: str) -> Block:
        """Read a name and its pairs; some GLM write JSON in their place."""
        key, key_end, value, value_end, closing = (
            re.escape(self.symbols[m]) for m in ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", self.closing)
        )
        position = skip_space(block, 0)
        if block[position : position + 1] == "{":
            found, position = json_at(block, position)
            return self.after(block, position, self.object_calls(found))
        name = re.compile(rf"([^\n]*?)\s*(?={key}|{closing}|\n)").match(block, position)
        if name is None:
            raise UnfinishedError
        position = name.end()
        ending = re.compile(rf"{value_end}(?=\s*(?:{key}|{closing}|\Z))")
        begin = re.compile(rf"{key}(.*?){key_end}\s*{value}", re.DOTALL)
        arguments: dict[str, str] = {}
        while True:
            position = skip_space(block, position)
            if not (pair := begin.match(block, position)):
                break
            if (end := ending.search(block, pair.end())) is None:
                raise UnfinishedError
            arguments[pair.group(1)] = block[pair.end() : end.start()]
            position = end.end()
        if not block.startswith(self.symbols[self.closing], position):
            if self.symbols[self.closing] not in block[position:]:
                raise UnfinishedError
            raise NotACallError("a call must hold a name, keys and values alone")
        return self.after(block, position, [self.written_call(name.group(1), arguments)])


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

    def _item(self, text: str, position: int) -> tuple[Call, int]:
        separator = self.symbols[self.separator]
        if (found := text.find(separator, position)) < 0:
            raise UnfinishedError
        header = self.symbols.text(text[position:found]).strip()
        position = skip_space(text, found + len(separator))
        if fenced := FENCED.match(text, position):  # DeepSeek V3 and R1: the name and fenced JSON
            arguments, position = json_at(text, fenced.end())
            closing = _FENCE.match(text, position)
            return self.call(fenced.group(1), arguments), position if closing is None else closing.end()
        arguments, position = json_at(text, position)
        if numbered := NUMBERED.fullmatch(header):
            return self.call(numbered.group(1), arguments, header), position
        return self.call(header, arguments), position


FENCED = re.compile(r"([\w.-]+)\s*```(?:json)?\s*")
_FENCE = re.compile(r"\s*```")
NUMBERED = re.compile(r"(?:functions\.)?(.+):\d+", re.DOTALL)


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

    def _sequence(self, block: str) -> Block:
        """Read lists and named calls, which may each have the opening marker again."""
        call_id, marker = (re.escape(self.symbols[m]) for m in ("[CALL_ID]", "[ARGS]"))
        header = re.compile(rf"([\w./-]+)\s*(?:{call_id}\s*([\w-]+)\s*)?(?:{marker}\s*)?(?=\{{)")
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

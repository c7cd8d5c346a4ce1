"""Calls marked up as functions, whose arguments are texts between markers: Qwen3-Coder's, MiniMax's and GLM's."""

import re
from dataclasses import dataclass

from .calls import Call, NotACallError
from .notation import Head, UnfinishedError, WrittenNotation, json_at, skip_space
from .syntax import Block, CallSyntax


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

    def head(self, text: str, *, bare: bool) -> Head | None:
        """Return the head of the first function."""
        if (begin := self.form.function.match(text, skip_space(text, 0))) is None:
            return None
        return Head(self.written_call(begin.group(1), {}), begin.end(), self._parameters(bare))

    def _function(self, text: str, begin: "re.Match[str]", closing: str, bare: bool) -> tuple[Call, int]:
        parameters = self._parameters(bare, r"|\Z")
        arguments: dict[str, str] = {}
        position = begin.end()
        while True:
            position = skip_space(text, position)
            if parameters.begin.match(text, position):
                key, position = parameters.key(text, position)
                value, position = parameters.value(text, position)
                arguments.setdefault(str(key), value)
            elif text.startswith(self.form.function_end, position):
                return self.written_call(begin.group(1), arguments), position + len(self.form.function_end)
            elif text.startswith(closing, position) and closing:
                return self.written_call(begin.group(1), arguments), position
            elif closing and text.find(closing, position) >= 0:
                raise NotACallError("a function must hold parameters alone")
            else:
                raise UnfinishedError

    def _parameters(self, bare: bool, or_after: str = "") -> WrittenNotation:
        """Return how parameters are written: their end counts where another one or the function's end follows.

        Args:
            bare: Whether nothing need follow the function's end.
            or_after: Pattern of what else may follow it.
        """
        form, closing = self.form, re.escape(self.symbols[self.closing])
        follows = "" if bare else rf"\s*(?:{closing}|{form.function.pattern}{or_after})"
        last = re.escape(form.function_end) + follows
        ending = re.compile(rf"{re.escape(form.parameter_end)}(?=\s*(?:{form.parameter.pattern}|{last}))")
        beginnings = form.parameter.pattern.split("=")[0], form.function_end
        return WrittenNotation(form.parameter, form.parameter_end, beginnings, ending, form.lines)


@dataclass(frozen=True)
class TaggedSyntax(XmlSyntax):
    """Calls between ``<tool_call>`` and ``</tool_call>``: JSON objects (Qwen3, Hermes) or functions (Qwen3-Coder)."""

    def read(self, block: str, opening: str) -> Block:
        """Read JSON or functions, whichever the block begins with."""
        position = skip_space(block, 0)
        if not self.is_bare(opening) and block[position : position + 1] in ("{", "["):
            return self._objects(block, position)
        return super().read(block, opening)

    def head(self, text: str, *, bare: bool) -> Head | None:
        """Return the head of the first object or function."""
        return self.object_head(text, 0) or super().head(text, bare=bare)

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
        position = skip_space(block, 0)
        if block[position : position + 1] == "{":
            found, position = json_at(block, position)
            return self.after(block, position, self.object_calls(found))
        if (name := self._name.match(block, position)) is None:
            raise UnfinishedError
        position = name.end()
        pairs = self._pairs(r"|\Z")
        arguments: dict[str, str] = {}
        while pairs.begin.match(block, skip_space(block, position)):
            key, position = pairs.key(block, position)
            value, position = pairs.value(block, position)
            arguments.setdefault(str(key), value)
        position = skip_space(block, position)
        if not block.startswith(self.symbols[self.closing], position):
            if self.symbols[self.closing] not in block[position:]:
                raise UnfinishedError
            raise NotACallError("a call must hold a name, keys and values alone")
        return self.after(block, position, [self.written_call(name.group(1), arguments)])

    def head(self, text: str, *, bare: bool) -> Head | None:
        """Return the head of the call."""
        if objects := self.object_head(text, 0):
            return objects
        name = self._name.match(text, skip_space(text, 0))
        return name and Head(self.written_call(name.group(1), {}), name.end(), self._pairs())

    @property
    def _name(self) -> "re.Pattern[str]":
        key, closing = (re.escape(self.symbols[marker]) for marker in ("<arg_key>", self.closing))
        return re.compile(rf"([^\n]*?)\s*(?={key}|{closing}|\n)")

    def _pairs(self, or_after: str = "") -> WrittenNotation:
        """Return how pairs are written; a value may also end before what a pattern matches."""
        key, key_end, value, value_end, closing = (
            re.escape(self.symbols[m]) for m in ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", self.closing)
        )
        begin = re.compile(rf"{key}(.*?){key_end}\s*{value}", re.DOTALL)
        ending = re.compile(rf"{value_end}(?=\s*(?:{key}|{closing}{or_after}))")
        follows = self.symbols["<arg_key>"], self.symbols[self.closing]
        return WrittenNotation(begin, self.symbols["</arg_value>"], follows, ending, lines=False)

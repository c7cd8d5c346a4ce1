"""gpt-oss's answers: messages on channels, of which the analysis is thinking, and those to a recipient are calls."""

import re

from .answer import BadCall, Kind, Part
from .calls import Call, NotACallError
from .dialect import Dialect
from .notation import Head, UnfinishedError, json_at, json_head, skip_space
from .partial import CallBegun, CallFollower, CallText
from .syntax import CallSyntax, Tools

_Piece = Part | Call | BadCall | CallBegun | CallText

_SYMBOL = re.compile("([\ud800-\udbff])")
_CHANNEL = re.compile(r"\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")


class ChannelReader:
    """The words of an answer in gpt-oss's form, symbols in place of its markers."""

    def __init__(self, dialect: Dialect, tools: Tools, prompt: str, partial: bool = False):
        """Begin an answer.

        Args:
            dialect: The marks.
            tools: Tools that may be called; without any, calls are text.
            prompt: The end of the prompt: it may have begun a message.
            partial: Whether to give a call's beginning and its arguments as they are written.
        """
        self._symbols = dialect.symbols
        self._syntax = CallSyntax(dialect.symbols, "", "", tools=tools) if tools else None
        self.size = 0
        self._pieces: list[_Piece] = []
        self._header: str | None = None  # None in a message's body
        self._kind: Kind | None = "text"  # None: the body of a call
        self._recipient = ""
        self._body = ""
        self._partial = partial
        self._follower: CallFollower | None = None
        self._fresh = False  # nothing was said yet
        self._given = 0
        begun = prompt.rpartition(dialect.symbols["<|start|>"])
        if begun[1]:
            self._header = ""
            self._take("".join(begun[2:]))
            self._pieces.clear()
            self.size = 0
        self._fresh = self._header is not None and not _SYMBOL.search(self._header)
        self._given = len(self._header or "")

    def pieces(self) -> list[_Piece]:
        """Return the pieces since the last time."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def take(self, said: str) -> None:
        """Take words."""
        self._take(said)

    def finish(self, *, cut: bool) -> None:
        """Let go of what is held back, at the answer's end."""
        if self._header is None and self._kind is None:
            self._end_call(cut)
        self._header = ""

    def _take(self, said: str) -> None:
        for run in _SYMBOL.split(said):
            if run:
                self._marker(run) if _SYMBOL.match(run) else self._words(run)
                self.size += len(run)

    def _words(self, text: str) -> None:
        size = len(text)
        if self._header is not None:
            self._header += text
            begun = self._header[self._given :].lstrip()
            if not self._fresh or begun.startswith("to=") or "to=".startswith(begun):
                return
            text, self._header, self._kind = self._header[self._given :], None, "text"  # an answer without channels
        self._fresh = False
        if self._kind is None:
            self._more(text)
        else:
            start = self.size + size - len(text)
            self._pieces.append(Part(self._kind, text, start, len(text)))

    def _marker(self, symbol: str) -> None:
        marker = self._symbols.text(symbol)
        if self._header is None and self._kind is None and self._inside_string():
            self._more(symbol)
            return
        if marker == "<|message|>" and self._header is not None:
            self._begin_body(self._header)
        elif self._header is not None and marker in ("<|channel|>", "<|constrain|>"):
            self._header += symbol
            self._fresh = False
        elif marker != "<|constrain|>":
            if self._header is None and self._kind is None:
                self._end_call(cut=False)
            self._header = symbol if marker == "<|channel|>" else ""
            self._fresh = False

    def _begin_body(self, header: str) -> None:
        channel = _CHANNEL.match(header.partition(self._symbols["<|channel|>"])[2])
        recipient = _RECIPIENT.search(self._symbols.text(header))
        self._header, self._body, self._fresh = None, "", False
        self._recipient = recipient.group(1) if recipient else ""
        if self._recipient and self._syntax is not None:
            self._kind = None
            self._follower = CallFollower(self._syntax, self._head) if self._partial else None
        else:
            self._kind = "thinking" if channel and channel.group(1) == "analysis" else "text"

    def _more(self, said: str) -> None:
        self._body += said
        if self._follower is not None:
            self._pieces += self._follower.take(self._body)

    def _head(self, body: str) -> Head | None:
        assert self._syntax is not None
        return json_head(self._syntax.call(self._called, {}), body, skip_space(body, 0))

    @property
    def _called(self) -> str:
        return self._recipient.removeprefix("functions.")

    def _inside_string(self) -> bool:
        try:
            json_at(self._body, skip_space(self._body, 0))
        except UnfinishedError as error:
            return error.in_string
        except NotACallError:
            return False
        return False

    def _end_call(self, cut: bool) -> None:
        body, self._body = self._body, ""
        syntax = self._syntax
        if syntax is None:
            return
        try:
            if body.strip():
                value, end = json_at(body, skip_space(body, 0))
                if body[end:].strip():
                    raise NotACallError("arguments must be one JSON object")
            elif cut:
                return
            else:
                value = {}
            self._pieces.append(syntax.call(self._called, value))
        except (UnfinishedError, NotACallError) as error:
            words = self._symbols.text(body)
            if cut and self._follower is not None and self._follower.begun:
                return  # what was said of the call has been given, and is no text
            if cut:
                self._pieces.append(Part("text", words, self.size - len(body), len(body)))
            else:
                self._pieces.append(BadCall(f"{self._recipient}: {words}", str(error) or "the call has no end"))

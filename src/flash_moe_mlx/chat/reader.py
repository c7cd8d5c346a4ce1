"""Reads an answer token by token and separates thinking, text and tool calls.

mlx_lm's TextStateMachine finds the markers and holds back text that may be the beginning of one. It is fed symbols for
the markers that are tokens of their own, so that text which looks like a marker is text. The rest of a call is read by
its grammar.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from mlx_lm.generate import TextStateMachine

from ..runtime.thinking import thinking_at_end
from .answer import BadCall, Kind, Part
from .calls import Call, NotACallError
from .channels import ChannelReader
from .dialect import Dialect, dialect_of
from .inline_thinking import SpokenMarkers
from .notation import UnfinishedError
from .partial import CallBegun, CallFollower, CallText
from .syntax import Block, CallSyntax, Tools
from .text import AnswerText

Piece = Part | Call | BadCall | CallBegun | CallText

_MAX_REJECTED = 64  # openings that begin no call; after them the answer's words are words
_SYMBOL = re.compile("([\ud800-\udbff])")


class AnswerReader:
    """Tells thinking, text and tool calls apart.

    Example:
        >>> reader = AnswerReader(tokenizer, prompt, tools)
        >>> for response in stream_generate(model, tokenizer, prompt):
        ...     for piece in reader.feed(response.token, response.finish_reason):
        ...         print(piece)

    Attributes:
        said: The text of the last token, markers included.
    """

    said = ""

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int] = (),
        tools: Tools = None,
        *,
        called: bool = False,
        partial: bool = False,
    ):
        """Begin an answer.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`.
            prompt: The prompt's tokens: templates may open or close the thinking there.
            tools: Tools that may be called; without any, calls are text.
            called: Whether the prompt ends with the opening of a call.
            partial: Whether to give a call's beginning and its arguments as they are written, before the call itself.
                If it turns out to be none, text follows instead, or nothing where the answer was cut.
        """
        dialect = dialect_of(tokenizer).with_tools(tools)
        self._symbols = dialect.symbols
        self._ends = getattr(tokenizer, "eos_token_ids", ())
        self._text = AnswerText(tokenizer, prompt, message=True)
        self._spoken = SpokenMarkers(tokenizer, "" if dialect.channels else dialect.think_end)
        self._words: _Words | ChannelReader
        if dialect.channels:
            self._words = ChannelReader(dialect, tools, self._said(tokenizer, prompt), partial)
        else:
            self._words = _Words(dialect, thinking_at_end(tokenizer, prompt), called, partial)

    def feed(self, token: int, finish_reason: str | None = None) -> list[Piece]:
        """Take a token; returns the pieces that are certain.

        Args:
            token: The token; one that ends the answer is not text.
            finish_reason: Why the answer ends with it: "length" if it was cut; None while it continues.
        """
        symbol = self._symbols.token(token)
        if symbol is not None:
            self._text.drop_half()
            self.said = self._symbols.text(symbol)
            self._words.take(symbol)
        else:
            self.said = "" if token in self._ends else self._text.piece(token)
            self._words.take(self.said)
        if finish_reason is not None:
            self._words.finish(cut=finish_reason == "length")
        pieces: list[Piece] = [*self._words.pieces()]
        for piece in pieces:
            if isinstance(piece, BadCall) or (isinstance(piece, Part) and piece.kind == "text"):
                self._spoken.take(piece.text)
        return pieces

    @property
    def size(self) -> int:
        """How much the model has said so far, in the unit of :attr:`Part.start`."""
        return self._words.size

    def _said(self, tokenizer: Any, prompt: Sequence[int]) -> str:
        """Return the end of the prompt, with symbols in place of markers."""
        text = AnswerText(tokenizer)
        return "".join(self._symbols.token(token) or text.piece(token) for token in prompt[-32:])


class _Words:
    """The words of an answer with one pair of markers for thinking and one way to write calls.

    A state is where the next words belong: "open" before anything was said, when thinking can still be opened, then
    "text" or "thinking". Between a call's opening and its end the words are the call's.
    """

    def __init__(self, dialect: Dialect, thinking: str, called: bool, partial: bool):
        self._dialect = dialect
        self._syntax = dialect.calls
        self.size = 0
        self._pieces: list[Piece] = []
        self._partial = partial
        self._follower: CallFollower | None = None
        self._rejected = 0
        self._strip = False  # the line ends after a marker
        self._space = ""  # at the end of what was said; a call swallows it
        self._space_start = 0
        self._state: tuple[Any, ...]
        self._machine = self._make_machine()
        self._enter({"open": "thinking", "closed": "text"}.get(thinking, "open"))
        self._strip = self._where == "thinking"
        self._block: str | None = None
        if called and self._syntax is not None:
            self._begin_block(self._dialect.symbols[self._syntax.opening], 0)

    def pieces(self) -> list[Piece]:
        """Return the pieces since the last time."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def take(self, said: str) -> None:
        """Take words."""
        self.size += len(said)
        self._take(said)

    def finish(self, *, cut: bool) -> None:
        """Let go of what is held back, at the answer's end."""
        given = self._block is not None and self._follower is not None and self._follower.begun
        self._partial = False  # words that are looked at again hold whole calls alone
        before = len(self._pieces)
        while self._block is not None:
            self._finish_block(cut)
        self._state, rest, _ = TextStateMachine.flush(self._state)
        self._say(rest)
        self._flush_space()
        if cut and given:  # what was said of the call has been given, and is no text
            self._pieces[before:] = [piece for piece in self._pieces[before:] if not isinstance(piece, Part)]

    # Words.

    def _make_machine(self) -> TextStateMachine:
        symbols, openings = self._dialect.symbols, []
        if self._syntax is not None and self._rejected < _MAX_REJECTED:
            openings = [symbols[self._syntax.opening], *(symbols[bare] for bare in self._syntax.bare)]
        calls = [(opening, f"call{opening}") for opening in openings]
        start, end = symbols.of(self._dialect.think_start), symbols.of(self._dialect.think_end)
        edges: dict[str, list[tuple[str, str]]]
        self._markers = dict.fromkeys(("open", "text", "thinking"), "") | {name: opening for opening, name in calls}
        edges = {"open": list(calls), "text": list(calls), "thinking": list(calls)} | {name: [] for _, name in calls}
        if start:
            edges["open"].append((start, "thinking:"))
            edges["thinking"].append((end, "text:"))
            edges |= {"thinking:": edges["thinking"], "text:": edges["text"]}
            self._markers |= {"thinking:": start, "text:": end}
        return TextStateMachine(edges)

    def _enter(self, where: str) -> None:
        self._where = where
        self._state = self._machine.make_state(where)

    def _take(self, said: str) -> None:
        """Take words; they are the last that were said, some of them perhaps again."""
        if self._block is not None:
            self._block += said
            self._try_block(len(said))
            return
        if not said:
            return
        self._state, segments = TextStateMachine.split(self._state, said)
        held = self._state[3]
        position = self._position(segments, held)
        for i, (name, text) in enumerate(segments):
            if i:
                position += len(self._markers[name])
                self._change(name)
            if name.startswith("call"):
                self._begin_block(self._markers[name], position - len(self._markers[name]), text)
                return
            self._say(text, position)
            position += len(text)
        if self._where == "open" and segments[-1][1].strip():
            self._enter("text")
            self._state, segments = TextStateMachine.split(self._state, held)
            self._say(segments[0][1], position)

    def _position(self, segments: list[tuple[str, str]], held: str) -> int:
        """Return where the first segment begins in all that was said."""
        markers = sum(len(self._markers[name]) for name, _ in segments[1:])
        return self.size - len(held) - markers - sum(len(text) for _, text in segments)

    def _change(self, name: str) -> None:
        if name.startswith("call"):
            return
        if name == "thinking:":
            self._space = ""  # white space before the thinking is nobody's
        elif self._where == "thinking":
            self._space = self._space.rstrip("\n")  # and the line ends around a marker are the template's
        self._flush_space()
        self._where, self._strip = name.rstrip(":"), True

    def _say(self, text: str, position: int | None = None) -> None:
        """Emit words of the state at hand, but for white space that a call may follow."""
        start = self.size - len(text) if position is None else position
        if self._strip:
            start += len(text) - len(text.lstrip("\n"))
            text = text.lstrip("\n")
            self._strip = not text
        if not text:
            return
        start -= len(self._space)
        text = self._space + text
        if self._syntax is not None or self._where in ("open", "thinking"):
            kept = len(text.rstrip())
            self._space, self._space_start = text[kept:], start + kept
            text = text[:kept]
        else:
            self._space = ""
        self._emit(text, start)

    def _emit(self, text: str, start: int) -> None:
        kind: Kind = "thinking" if self._where == "thinking" else "text"
        for run in _SYMBOL.split(text):
            if run:
                self._pieces.append(Part(kind, self._dialect.symbols.text(run), start, len(run)))
            start += len(run)

    def _flush_space(self) -> None:
        space, self._space = self._space, ""
        self._emit(space, self._space_start)

    # Calls.

    def _begin_block(self, opening: str, start: int, text: str = "") -> None:
        self._block, self._opening, self._block_start = text, opening, start
        self._follower = None
        if self._partial and self._where != "thinking":
            syntax = self._required_syntax
            self._follower = CallFollower(syntax, partial(syntax.head, bare=self._is_bare))
        if text:
            self._try_block(len(text))

    def _try_block(self, added: int) -> None:
        """Look whether the words since an opening are calls by now, or can no longer be any."""
        assert self._block is not None
        syntax, block = self._required_syntax, self._block
        if syntax.calls_no_tool(block) if self._is_bare else len(block) <= added + 80 and syntax.spoken_of(block):
            self._reject()
        elif self._may_end(syntax, block, added):
            try:
                read = syntax.read(block, self._opening)
            except UnfinishedError:
                self._follow(block)
            except NotACallError as error:
                if self._is_bare or self._closing in block:
                    self._refuse(error)
            else:
                self._accept(read)
        else:
            self._follow(block)

    def _follow(self, block: str) -> None:
        if self._follower is not None:
            self._pieces += self._follower.take(self._opening + block if self._is_bare else block)

    @property
    def _closing(self) -> str:
        return self._dialect.symbols[self._required_syntax.closing]

    @property
    def _required_syntax(self) -> CallSyntax:
        assert self._syntax is not None
        return self._syntax

    @property
    def _is_bare(self) -> bool:
        return self._required_syntax.is_bare(self._opening)

    def _may_end(self, syntax: CallSyntax, block: str, added: int) -> bool:
        longest = max(map(len, syntax.ends), default=0)
        tail = block[-(added + longest + 64 if self._is_bare else added + longest) :]
        if not self._is_bare:
            return any(end in tail for end in syntax.ends)
        return any((found := tail.rfind(end)) >= 0 and tail[found + len(end) :].strip() for end in syntax.ends) or (
            bool(syntax.ends) and syntax.ends[0] in tail
        )

    def _finish_block(self, cut: bool) -> None:
        assert self._block is not None
        syntax = self._required_syntax
        if cut and syntax.closing:
            self._reject()
            return
        try:
            read = syntax.finish(self._block, self._opening)
        except UnfinishedError:
            if cut or self._is_bare or not self._block.strip() or syntax.spoken_of(self._block):
                self._reject()
            else:
                self._refuse(NotACallError("the call has no end"))
        except NotACallError as error:
            self._refuse(error)
        else:
            self._accept(read)

    def _accept(self, read: Block) -> None:
        assert self._block is not None
        known = all(call.name in self._required_syntax.names for call in read.calls)
        if not read.calls or (self._is_bare and not known):
            self._reject()
            return
        self._space = ""
        self._pieces += read.calls
        rest = self._block[read.end :]
        self._block, self._strip = None, True
        self._enter("thinking" if self._where == "thinking" else "open")
        self._again(rest)

    def _refuse(self, error: NotACallError) -> None:
        """Emit what is no call, up to its closing marker, as such; where it is only thought of, as thinking."""
        assert self._block is not None
        if self._where == "thinking" or self._is_bare:
            self._reject()
            return
        found = self._block.find(self._closing) if self._closing else -1
        end = len(self._block) if found < 0 else found + len(self._closing)
        words, rest = self._opening + self._block[:end], self._block[end:]
        self._flush_space()
        self._pieces.append(BadCall(self._dialect.symbols.text(words), str(error)))
        self._block, self._strip = None, False
        self._enter("text")
        self._again(rest)

    def _reject(self) -> None:
        """Emit an opening as the text that it is, and look at what follows again."""
        assert self._block is not None
        rest, self._block = self._block, None
        self._rejected += 1
        if self._rejected == _MAX_REJECTED:
            self._machine = self._make_machine()
        self._enter("text" if self._where == "open" else self._where)
        self._strip = False
        self._say(self._opening, self._block_start)
        self._again(rest)

    def _again(self, rest: str) -> None:
        """Take words that were the block's."""
        if rest:
            self._take(rest)

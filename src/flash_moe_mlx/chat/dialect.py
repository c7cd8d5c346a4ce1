"""Finds the markers of a model's answers from the tokenizer's vocabulary and its chat template."""

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from .gemma import QUOTE, GemmaSyntax
from .markup import MINIMAX_XML, PairSyntax, TaggedSyntax, XmlSyntax
from .symbols import Symbols
from .syntax import CallSyntax, ForeignSyntax, MistralSyntax, SectionSyntax, Tools

HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")
"""gpt-oss's markers: its answers are messages on channels."""

KIMI = (
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
DEEPSEEK = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
)  # fmt: skip
PAIRS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
MISTRAL = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")


@dataclass(frozen=True)
class Dialect:
    """The markers of one model's answers.

    Attributes:
        name: The family's name.
        symbols: Symbols that stand for the markers.
        think_start: Marker that opens the thinking, with the text that always follows it; empty without thinking.
        think_end: Marker that closes the thinking.
        calls: Syntax of calls; None if the model knows none.
        channels: Whether answers are messages on channels, as gpt-oss's.
        ids: Form of calls' ids: "kimi" if they consist of the name and a number, else "any".
    """

    name: str
    symbols: Symbols
    think_start: str = ""
    think_end: str = ""
    calls: CallSyntax | None = None
    channels: bool = False
    ids: str = "any"

    def with_tools(self, tools: Tools) -> "Dialect":
        """Return it for a request's tools: calls are read if there are any."""
        return replace(self, calls=None if not tools or self.calls is None else replace(self.calls, tools=tools))

    @property
    def call_beginning(self) -> str:
        """The beginning of an answer that must call a tool."""
        if self.channels:
            return "<|channel|>commentary to=functions."
        return "" if self.calls is None else self.calls.opening

    @property
    def has_calls(self) -> bool:
        """Whether the model can be offered tools."""
        return self.calls is not None or self.channels


_dialects: "WeakKeyDictionary[Any, tuple[Any, Dialect]]" = WeakKeyDictionary()


def dialect_of(tokenizer: Any) -> Dialect:
    """Return the marks of a tokenizer's model, found at the first call and again for another template."""
    key = (template_of(tokenizer), getattr(tokenizer, "tool_call_start", None))
    try:
        known = _dialects.get(tokenizer)
    except TypeError:  # it doesn't support weak references
        return _find(tokenizer)
    if known is None or known[0] != key:
        known = _dialects[tokenizer] = (key, _find(tokenizer))
    return known[1]


def template_of(tokenizer: Any) -> str:
    """Return the text of a tokenizer's chat template; all of them where it has several, nothing where it has none."""
    template = getattr(getattr(tokenizer, "_tokenizer", tokenizer), "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else ""


def _find(tokenizer: Any) -> Dialect:
    hub = getattr(tokenizer, "_tokenizer", tokenizer)
    vocabulary: dict[str, int] = hub.get_vocab() if hasattr(hub, "get_vocab") else {}
    template = template_of(tokenizer)

    def known(*markers: str) -> bool:
        return all(marker in vocabulary or marker in template for marker in markers)

    if all(marker in vocabulary for marker in HARMONY[:4]):
        return Dialect("gpt-oss", Symbols(vocabulary, HARMONY), channels=True)
    start, end = getattr(tokenizer, "think_start", None) or "", getattr(tokenizer, "think_end", None) or ""
    if not start and "[THINK]" in vocabulary and "[/THINK]" in vocabulary:
        start, end = "[THINK]", "[/THINK]"
    opened = start.removesuffix("thought")  # Gemma 4's is a token and a word
    thinking = (opened, end)

    def dialect(name: str, kind: type[CallSyntax], opening: str, closing: str, *more: str, **how: Any) -> Dialect:
        symbols = Symbols(vocabulary, (*thinking, opening, closing, *more))
        ids = how.pop("ids", "any")
        return Dialect(name, symbols, start, end, kind(symbols, opening, closing, **how), ids=ids)

    if known(KIMI[0], KIMI[2], KIMI[3]):
        parts = {"begin": KIMI[2], "separator": KIMI[3], "end": KIMI[4], "bare": (KIMI[2],)}
        return dialect("kimi", SectionSyntax, KIMI[0], KIMI[1], *KIMI, ids="kimi", **parts)
    if known(DEEPSEEK[0], DEEPSEEK[2], DEEPSEEK[3]):
        parts = {"begin": DEEPSEEK[2], "separator": DEEPSEEK[3], "end": DEEPSEEK[4], "bare": (DEEPSEEK[2],)}
        return dialect("deepseek", SectionSyntax, DEEPSEEK[0], DEEPSEEK[1], *DEEPSEEK, **parts)
    if known("<minimax:tool_call>"):
        how = {"form": MINIMAX_XML, "bare": ("<invoke name=",)}
        return dialect("minimax", XmlSyntax, "<minimax:tool_call>", "</minimax:tool_call>", **how)
    if known("<|tool_call>", "<tool_call|>"):
        return dialect("gemma", GemmaSyntax, "<|tool_call>", "<tool_call|>", QUOTE)
    if known("[TOOL_CALLS]"):
        return dialect("mistral", MistralSyntax, "[TOOL_CALLS]", "", *MISTRAL)
    if known("<tool_call>"):
        if known(*PAIRS):
            return dialect("glm", PairSyntax, "<tool_call>", "</tool_call>", *PAIRS)
        bare = ("<function=",) if "<function=" in template else ()
        return dialect("qwen", TaggedSyntax, "<tool_call>", "</tool_call>", bare=bare)
    if getattr(tokenizer, "has_tool_calling", False):
        opening, closing = tokenizer.tool_call_start, tokenizer.tool_call_end or ""
        return dialect("mlx-lm", ForeignSyntax, opening, closing, parser=tokenizer.tool_parser)
    return Dialect("plain", Symbols(vocabulary, thinking), start, end)

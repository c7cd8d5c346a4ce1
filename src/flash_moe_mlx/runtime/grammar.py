"""Grammars that answers obey: JSON schemas, Lark grammars and regular expressions, compiled by llguidance.

The size and nesting of a grammar are checked before llguidance sees it, and llguidance's own limits bound the time and
memory of everything after that: about a second for the largest grammar, and milliseconds per token.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import RequestError
from ..installation import install_command

MAX_GRAMMAR_BYTES = 64 << 10
"""Maximum size of a grammar. Compiling takes time in proportion to its square in the worst case, a second here."""

MAX_SCHEMA_DEPTH = 64
"""Maximum nesting of a schema's objects and lists."""

MAX_MULTIPLE = 20_000
"""Maximum least common multiple of a grammar's ``multipleOf``. Their automaton has as many states.

A schema of 45 bytes, ``{"multipleOf": 999983}``, took 32 seconds.
"""

_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.0-9eE]{1,400})')
_MAX_GRAMMAR_SYMBOLS = 100_000
_LEXER_FUEL = 200_000  # half a second's work on regular expressions; by default five times as much
_MAX_LEXER_STATES = 20_000  # up to 2 kB each

JSON_OPTIONS = {
    "whitespace_flexible": True,
    # A space, or a line break and indentation: a model that repeats white space would never get to the next token.
    "whitespace_pattern": r"\x20|\x0D?\x0A[\x20\x09]{0,40}",
    # What is not enforced would be ignored in silence.
    "lenient": False,
}
"""llguidance's options for JSON schemas, which a schema inside a Lark grammar has under "x-guidance"."""


@dataclass(frozen=True)
class Grammar:
    """A grammar for answers, not compiled yet.

    Example:
        >>> generate(model, tokenizer, prompt, schema=Grammar.regex(r"(yes|no)"))

    Attributes:
        text: The grammar in a form that llguidance compiles.
        where: The argument that it was given as, for errors.
    """

    text: str
    where: str = "schema"

    @classmethod
    def json_schema(cls, schema: Any, where: str = "schema") -> "Grammar":
        """Return the grammar of the JSON texts that a schema validates.

        Args:
            schema: A JSON schema: a mapping, its JSON text, or a pydantic model.
            where: The argument that it was given as, for errors.

        Raises:
            RequestError: If it is not a schema, or too large.
        """
        text, llguidance = _schema_text(schema, where), _llguidance()
        try:
            return cls(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS), where)
        except ValueError as error:
            raise RequestError(f"[{where}] must be a JSON schema, got {error}. Correct it.") from error

    @classmethod
    def json_object(cls, where: str = "schema") -> "Grammar":
        """Return the grammar of all JSON objects."""
        return cls.json_schema({"type": "object"}, where)

    @classmethod
    def lark(cls, text: str, where: str = "schema") -> "Grammar":
        """Return a grammar in llguidance's variant of Lark, which may embed JSON schemas as ``%json {...}``.

        Raises:
            RequestError: If it is not text, or too large.
        """
        checked = _checked_text(text, where)
        return cls(_llguidance().LLMatcher.grammar_from_lark(checked), where)

    @classmethod
    def regex(cls, text: str, where: str = "schema") -> "Grammar":
        """Return the grammar of the texts that a regular expression matches as a whole.

        Raises:
            RequestError: If it is not text, or too large.
        """
        checked = _checked_text(text, where)
        return cls(_llguidance().LLMatcher.grammar_from_regex(checked), where)

    def compile(self, tokenizer: Any, vocabulary_size: int) -> Any:
        """Return llguidance's matcher at the beginning of an answer. Takes up to a second, without Python's lock.

        Args:
            tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
            vocabulary_size: Number of the model's logits.

        Raises:
            RequestError: If llguidance can't compile it, or no answer obeys it.
        """
        _check_multiples(self.text, self.where)
        llguidance = _llguidance()
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=_LEXER_FUEL,
            max_grammar_size=_MAX_GRAMMAR_SYMBOLS,
            max_lexer_states=_MAX_LEXER_STATES,
            verbose_errors=False,
        )
        tokens = llguidance_tokenizer(tokenizer, vocabulary_size)
        matcher = llguidance.LLMatcher(tokens, self.text, log_level=0, limits=limits)
        self.check(matcher)
        matcher.compute_bitmask()
        self.check(matcher)
        if matcher.is_stopped() and not matcher.is_accepting():
            raise RequestError(f"[{self.where}] must allow some answer, got a grammar that allows none. Correct it.")
        return matcher

    def check(self, matcher: Any) -> None:
        """Check that a matcher of this grammar is usable.

        Raises:
            RequestError: If it is not; quotes llguidance.
        """
        if matcher.is_error():
            raise RequestError(
                f"[{self.where}] must be a grammar that llguidance accepts, got: {said_by(matcher)}. Correct it."
            )


def said_by(matcher: Any) -> str:
    """Return llguidance's words about a matcher's error, on one line."""
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:500]


def as_grammar(schema: Any, where: str = "schema") -> Grammar:
    """Return a grammar unchanged, and the grammar of anything else that :meth:`Grammar.json_schema` takes."""
    return schema if isinstance(schema, Grammar) else Grammar.json_schema(schema, where)


_tokenizers: "WeakKeyDictionary[Any, tuple[tuple[Any, ...], Any]]" = WeakKeyDictionary()


def llguidance_tokenizer(tokenizer: Any, vocabulary_size: int) -> Any:
    """Return llguidance's form of a tokenizer, made at the first call, which takes about a second for 250,000 tokens.

    Args:
        tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
        vocabulary_size: Number of the model's logits.

    Raises:
        RequestError: If llguidance does not support the tokenizer.
    """
    _llguidance()
    from llguidance.hf import from_tokenizer

    hub = getattr(tokenizer, "_tokenizer", tokenizer)
    ends = sorted(token for token in getattr(tokenizer, "eos_token_ids", ()) if token < vocabulary_size)
    key = (tuple(ends), vocabulary_size)
    known = _tokenizers.get(hub)
    if known is None or known[0] != key:
        try:
            made = from_tokenizer(hub, n_vocab=max(vocabulary_size, len(hub)), eos_token=ends or None)
        except (ValueError, TypeError) as error:
            raise RequestError(
                f"[tokenizer] must be one that llguidance supports, got {type(hub).__name__} ({error}). Leave out the "
                "schema."
            ) from error
        known = _tokenizers[hub] = (key, made)
    return known[1]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            f"[llguidance] is not installed, and answers that obey a schema need it. Run: {install_command('schema')}"
        ) from error
    return llguidance


def _schema_text(schema: Any, where: str) -> str:
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        schema = _json(json.loads, _checked_text(schema, where), where)
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"[{where}] must be a JSON schema, got {type(schema).__name__}. Pass an object.")
    _check_depth(schema, where)
    return _checked_text(_json(_dump, schema, where), where)


_dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)


def _json(convert: Callable[[Any], Any], value: Any, where: str) -> Any:
    try:
        return convert(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"[{where}] must be a JSON schema, got {error}. Correct it.") from error


def _check_depth(schema: Any, where: str) -> None:
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        level = [
            child
            for value in level
            if isinstance(value, Mapping | list | tuple)
            for child in (value.values() if isinstance(value, Mapping) else value)
        ]
        if not level:
            return
    raise RequestError(f"[{where}] must be nested at most {MAX_SCHEMA_DEPTH} levels deep, got more. Simplify it.")


def _check_multiples(text: str, where: str) -> None:
    """Refuse a grammar whose ``multipleOf`` have too large a common multiple, wherever it embeds a schema."""
    plain = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    common = 1
    for match in _MULTIPLE.finditer(re.sub(r'\\+(?=")', "", plain)):
        with suppress(InvalidOperation, OverflowError):  # no number: llguidance says so
            digits = Decimal(match[1]).normalize().as_tuple()
            exponent = digits.exponent if isinstance(digits.exponent, int) else 0
            size = int("".join(map(str, digits.digits))) * 10 ** min(max(exponent, 0), 9)
            common = math.lcm(common, size or 1)
            if common > MAX_MULTIPLE:
                raise RequestError(
                    f"[{where}] the least common multiple of its multipleOf must be at most {MAX_MULTIPLE}, got more. "
                    "Leave multipleOf out, and check the number afterwards."
                )


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"[{where}] must be text, got {type(text).__name__}. Pass a str.")
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(f"[{where}] must have at most {MAX_GRAMMAR_BYTES} bytes, got {size}. Simplify it.")
    if "\x00" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise RequestError(f"[{where}] must be Unicode text without null characters, got other text. Correct it.")
    return text

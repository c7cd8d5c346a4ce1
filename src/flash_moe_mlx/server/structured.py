"""Structured output: a request's response_format, grammar and strict tools, as a constraint on its answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..chat.call_grammar import bound_calls, call_opening
from ..chat.dialect import dialect_of
from ..errors import RequestError
from ..runtime.constraint import Constraint
from ..runtime.grammar import Grammar
from .api_error import ApiError
from .fields import as_optional_object

_SYNTAXES = {"lark": Grammar.lark, "regex": Grammar.regex}


def parse_grammar(body: Mapping[str, Any]) -> Grammar | None:
    """Return the grammar that a request's ``response_format`` or ``grammar`` asks for, if any.

    Raises:
        ApiError: 400, if it is invalid; quotes llguidance.
    """
    wanted = body.get("response_format"), body.get("grammar")
    formats, extension = (
        as_optional_object(value, name) for value, name in zip(wanted, ("response_format", "grammar"), strict=True)
    )
    kind = formats.get("type", "text")
    if extension and kind != "text":
        raise ApiError(400, "grammar must come without response_format, got both.", param="grammar")
    try:
        if extension:
            return _extension(extension)
        if kind == "json_object":
            return Grammar.json_object("response_format")
        if kind == "json_schema":
            described = as_optional_object(formats.get("json_schema"), "response_format.json_schema")
            if "schema" not in described:
                raise ApiError(400, "response_format.json_schema must have a schema.", param="response_format")
            return Grammar.json_schema(described["schema"], "response_format")
    except RequestError as error:
        raise ApiError(400, str(error), param="grammar" if extension else "response_format") from error
    if kind != "text":
        raise ApiError(
            400, "response_format.type must be text, json_object or json_schema, got another.", param="response_format"
        )
    return None


def _extension(value: Mapping[str, Any]) -> Grammar:
    syntax = value.get("syntax")
    if not isinstance(syntax, str) or syntax not in _SYNTAXES:
        raise ApiError(400, "grammar.syntax must be lark or regex, got another.", param="grammar")
    definition: Any = value.get("definition")  # checked there
    return _SYNTAXES[syntax](definition, "grammar")


def constraint_for(
    tokenizer: Any,
    prompt: Sequence[int],
    vocabulary_size: int,
    *,
    grammar: Grammar | None,
    tools: Sequence[Mapping[str, Any]] | None,
    call_required: bool,
) -> Constraint | None:
    """Return what keeps an answer to its grammar and its calls to the tools' schemas; None if nothing does.

    Args:
        tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
        prompt: The prompt's tokens; with ``call_required`` they end with the beginning of a call.
        vocabulary_size: Number of the model's logits.
        grammar: Grammar of the answer's text.
        tools: Tools that may be called.
        call_required: Whether the answer must begin with a call.

    Raises:
        ApiError: 400, if a grammar or a schema can't be used; quotes llguidance.
    """
    dialect = dialect_of(tokenizer).with_tools(tools)
    param = "tools"
    try:
        calls = None
        if tools:
            calls = bound_calls(
                dialect, tools, lambda made: made.compile(tokenizer, vocabulary_size), required=call_required
            )
        if call_required:
            grammar = None  # the answer is a call
        if grammar is None and calls is None:
            return None
        param = "tools" if grammar is None else grammar.where
        return Constraint(
            tokenizer,
            grammar,
            prompt,
            vocabulary_size,
            calls=None if calls is None else calls.grammar,
            opening=call_opening(dialect),
            opened=call_required,
        )
    except RequestError as error:
        raise ApiError(400, str(error), param=param) from error

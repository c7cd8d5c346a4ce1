"""Grammars of tool calls whose arguments obey the tools' schemas, in the forms that Qwen's models write."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..runtime.grammar import JSON_OPTIONS, Grammar
from .coercion import allowed_types, constants_of
from .dialect import Dialect
from .markup import TaggedSyntax

Tool = Mapping[str, Any]
Compile = Callable[[Grammar], Any]

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_TEXT = "text"
_STRING_BOUNDS = ("pattern", "format", "minLength", "maxLength")


@dataclass(frozen=True)
class BoundCalls:
    """Token and grammar that bind the calls of a model.

    Attributes:
        opening: Token that opens a call.
        grammar: Grammar of what follows it, closing marker included.
    """

    opening: int
    grammar: Grammar


def call_opening(dialect: Dialect) -> int | None:
    """Return the token that opens a call; None if the model has no such token."""
    return None if dialect.calls is None else dialect.symbols.token_of(dialect.calls.opening)


def is_strict(tool: Tool) -> bool:
    """Return whether a tool asks for arguments that obey its schema."""
    return _function(tool).get("strict") is True


def bound_calls(dialect: Dialect, tools: Sequence[Tool], compile_: Compile, *, required: bool) -> BoundCalls | None:
    """Return how the calls of some tools are bound.

    Strict tools are bound by their schemas. The arguments of others are any object; where a call is ``required``, they
    obey their schemas too, as far as llguidance supports these.

    Args:
        dialect: How the model writes.
        tools: The tools.
        compile_: Function that compiles a grammar, or raises a RequestError.
        required: Whether the answer must be a call.

    Returns:
        The grammar, or None if nothing asks for one, or if the model's calls have another form and no tool is strict.

    Raises:
        RequestError: If there are strict tools, and the model's calls have another form or a schema can't be used.
    """
    strict = any(map(is_strict, tools))
    if not strict and not required:
        return None
    calls, opening = dialect.calls, call_opening(dialect)
    closing = None if calls is None else dialect.symbols.token_of(calls.closing)
    if opening is None or closing is None or not isinstance(calls, TaggedSyntax):
        if strict:
            raise RequestError(
                f"[tools] strict must be left out for this model, got it: schemas don't bind calls in the form of "
                f"{dialect.name}. Leave it out."
            )
        return None
    form = _marked_up_call if calls.bare else _object_call

    def grammar(bound: Sequence[bool], tools: Sequence[Tool] = tools) -> Grammar:
        rules = [form(f"c{i}", tool, bound[i]) for i, tool in enumerate(tools)]
        names = " | ".join(f"c{i}" for i in range(len(tools)))
        text = [f'start: "\\n"? ({names}) "\\n"? <[{closing}]>', *(line for lines in rules for line in lines)]
        return Grammar.lark("\n".join([*text, f'{_TEXT}[suffix="\\n</parameter>\\n"]: /(?s:.*)/']), "tools")

    def usable(bound: Sequence[bool], tools: Sequence[Tool] = tools) -> Grammar | None:
        try:
            made = grammar(bound, tools)
            compile_(made)
        except RequestError:
            return None
        return made

    if required and (made := usable([True] * len(tools))):
        return BoundCalls(opening, made)
    if required:  # alone: with the others, many tools took a second each
        alone = [is_strict(tool) or usable([True], [tool]) is not None for tool in tools]
        if not all(alone) and (made := usable(alone)):
            return BoundCalls(opening, made)
    made = grammar([is_strict(tool) for tool in tools])
    compile_(made)
    return BoundCalls(opening, made)


def _function(tool: Tool) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _parameters(tool: Tool) -> Mapping[str, Any]:
    parameters = _function(tool).get("parameters")
    return parameters if isinstance(parameters, Mapping) else {}


def _closed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema that lists its properties without any others, unless it says that there may be more."""
    joined = any(word in parameters for word in ("anyOf", "oneOf", "allOf", "$ref", "patternProperties"))
    if joined or not parameters.get("properties"):
        return parameters
    return {"additionalProperties": False, **parameters}


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS}, ensure_ascii=False)}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _object_call(rule: str, tool: Tool, bound: bool) -> list[str]:
    """Return the rules of a call as an object: ``{"name": "f", "arguments": {...}}``."""
    schema = {**_closed(_parameters(tool)), "type": "object"} if bound else _ANY_OBJECT
    head = f'{{"name": {_literal(_function(tool)["name"])}, "arguments": '
    return [f'{rule}: {_literal(head)} {rule}_a "}}"', f"{rule}_a: {_json_rule(schema)}"]


def _marked_up_call(rule: str, tool: Tool, bound: bool) -> list[str]:
    """Return the rules of a call as a function with parameters, in the schema's order."""
    head, tail = _literal(f"<function={_function(tool)['name']}>\n"), _literal("</function>")
    parameters = _parameters(tool)
    if not bound:
        return [f"{rule}: {head} {rule}_p* {tail}", f'{rule}_p: "<parameter=" /[^<>\\n]{{1,64}}/ ">\\n" {_TEXT}']
    properties, required = parameters.get("properties") or {}, parameters.get("required") or []
    missing = [name for name in required if name not in properties]
    if missing or any(word in parameters for word in ("anyOf", "oneOf", "allOf", "$ref")):
        raise RequestError(
            f"[tools] parameters of {_function(tool)['name']} must be an object with properties for this model, got "
            "another schema. List its properties."
        )
    parts, rules = [], []
    for i, (name, schema) in enumerate(properties.items()):
        value, lines = _value(f"{rule}_{i}", name, schema, parameters)
        part = f"{_literal(f'<parameter={name}>' + chr(10))} {value}"
        parts.append(part if name in required else f"({part})?")
        rules += lines
    return [f"{rule}: {' '.join([head, *parts, tail])}", *rules]


def _value(rule: str, name: str, schema: Any, root: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return an expression for a parameter's value up to the parameter's end, and the rules that it needs.

    Texts come without quotes. What may be any text may be anything: the reader brings it to the schema's type.
    """
    end = _literal("\n</parameter>\n")
    if constants := constants_of(schema, root):
        words = [c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in constants]
        return f"({' | '.join(map(_literal, words))}) {end}", []
    types = allowed_types(schema, root)
    if types and "string" not in types:
        shared = {word: root[word] for word in ("$defs", "definitions") if word in root}
        return f"{rule} {end}", [f"{rule}: {_json_rule({**shared, **schema})}"]
    if types == {"string"} and any(word in schema for word in _STRING_BOUNDS):
        raise RequestError(
            f"[tools] strings of parameter {name} must be free or one of an enum for this model, got bounds on them. "
            f"Leave out {', '.join(_STRING_BOUNDS)}."
        )
    return _TEXT, []

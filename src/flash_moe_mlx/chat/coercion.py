"""Arguments that a model wrote as text, brought to the types that the tool's schema has for them.

mlx_lm's parsers read a schema's ``type`` alone where it is one word, and take "null" for nothing whatever the type is.
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from .calls import PARSER_ERRORS, NotACallError, read_json

_INTEGER = re.compile(r"[+-]?\d{1,300}(\.0*)?", re.ASCII)
_MAX_REFERENCES = 32

_TYPES: dict[type, str] = {
    bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null",
}  # fmt: skip

# Names that schemas written by hand have for JSON's types.
_ALIASES = {
    "str": "string", "text": "string", "varchar": "string", "char": "string", "enum": "string", "int": "integer",
    "long": "integer", "float": "number", "double": "number", "bool": "boolean", "dict": "object", "map": "object",
    "list": "array", "tuple": "array", "none": "null",
}  # fmt: skip


def parameters_of(tools: Sequence[Mapping[str, Any]] | None, name: str) -> Mapping[str, Any]:
    """Return the schema of a tool's parameters; an empty one where there is none."""
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def coerce_text(text: str, name: str, parameters: Mapping[str, Any]) -> Any:
    """Return the value that a model means by the text of an argument.

    Args:
        text: What the model wrote.
        name: The argument's name.
        parameters: The schema of all parameters, as JSON Schema has it.
    """
    schema = _property(name, parameters)
    types = allowed_types(schema, parameters)
    constants = constants_of(schema, parameters)
    if text in constants:
        return text
    for constant in constants:
        if not isinstance(constant, str) and _same(constant, text):
            return constant
    if not types:  # anything: what can be nothing but JSON is JSON
        with suppress(NotACallError):
            value = read_json(text)
            return value if isinstance(value, dict | list) else text
        return text
    stripped = text.strip()
    if stripped == "null" and ("null" in types or "string" not in types):
        return None
    for kind, read in _READERS:
        if kind in types:
            with suppress(*PARSER_ERRORS):
                value = read(stripped)
                # Where a string may be meant, "007" and "1e3" are no numbers.
                if "string" not in types or isinstance(value, dict | list) or json.dumps(value) == stripped:
                    return value
    return text


def coerce_value(value: Any, name: str, parameters: Mapping[str, Any]) -> Any:
    """Return the value that a model means by an argument in JSON: a text where another type must be is read as one."""
    if not isinstance(value, str):
        return value
    types = allowed_types(_property(name, parameters), parameters)
    return value if not types or "string" in types else coerce_text(value, name, parameters)


def allowed_types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """Return JSON's types that a schema allows; none where it allows all or says nothing of them."""
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return set()
    if isinstance(reference := schema.get("$ref"), str):
        return allowed_types(_referred(reference, root), root, depth + 1)
    declared = schema.get("type")
    names = [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else []
    types = {_type_name(name) for name in names if isinstance(name, str)}
    if types:
        return types
    for word in ("anyOf", "oneOf", "allOf"):
        if isinstance(branches := schema.get(word), list):
            found = [allowed_types(branch, root, depth + 1) for branch in branches]
            if word != "allOf" and not all(found):
                return set()  # one of them takes anything
            types |= set().union(*found)
    if types:
        return types
    if isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        return {_TYPES.get(type(value), "string") for value in values}
    if "properties" in schema:
        return {"object"}
    return {"array"} if "items" in schema else set()


def keeps_text(name: str, parameters: Mapping[str, Any], *, written: bool) -> bool:
    """Return whether every text of an argument is its own value.

    Args:
        name: The argument's name.
        parameters: The schema of all parameters.
        written: Whether the model writes every value as text, rather than in JSON.
    """
    schema = _property(name, parameters)
    types = allowed_types(schema, parameters)
    if written:
        return types == {"string"} and not constants_of(schema, parameters)
    return not types or "string" in types


def _property(name: str, parameters: Mapping[str, Any]) -> Any:
    """Return the schema of one parameter, also where the object is put together from others."""
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    if isinstance(reference := parameters.get("$ref"), str):
        referred = _referred(reference, parameters)
        if isinstance(referred, Mapping) and isinstance(referred.get("properties"), Mapping):
            return referred["properties"].get(name)
    for word in ("allOf", "anyOf", "oneOf"):
        branches = parameters.get(word)
        for branch in branches if isinstance(branches, list) else ():
            found = branch.get("properties") if isinstance(branch, Mapping) else None
            if isinstance(found, Mapping) and name in found:
                return found[name]
    return parameters.get("additionalProperties")


def constants_of(schema: Any, root: Mapping[str, Any]) -> list[Any]:
    """Return the values that a schema lists as its only ones; none where it lists none."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            break
        schema = _referred(schema["$ref"], root)
    if not isinstance(schema, Mapping):
        return []
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return values if isinstance(values, list) else []


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """Follow a reference inside the schema: ``#/$defs/Name``."""
    found: Any = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step) if isinstance(found, Mapping) else None
    return None if found is root else found


def _type_name(name: str) -> str:
    name = name.strip().lower()
    return _ALIASES.get(name, name)


def _same(constant: Any, text: str) -> bool:
    with suppress(NotACallError):
        value = read_json(text)
        return type(value) is type(constant) and value == constant
    return False


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError("no integer")
    return int(text.split(".")[0])


def _number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text) if "." not in text else float(text)
    value = float(text)
    if not math.isfinite(value) or "_" in text:
        raise ValueError("no number")
    return value


def _container(text: str, kind: type) -> Any:
    """Read JSON, or what Python writes in its place, as models trained on both do."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        value = ast.literal_eval(text)
    if isinstance(value, tuple) and kind is list:
        return list(value)
    if not isinstance(value, kind):
        raise TypeError("another type")
    return value


_READERS = (
    ("boolean", _boolean),
    ("integer", _integer),
    ("number", _number),
    ("object", lambda text: _container(text, dict)),
    ("array", lambda text: _container(text, list)),
)

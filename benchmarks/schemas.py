"""Seeded JSON schemas of the kinds that JSONSchemaBench collects, all with answers of bounded length."""

import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema

Schema = dict[str, Any]

FORMATS = ("date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "duration")
_NAMES = ("name", "id", "tags", "größe", "a b", "x-y", "$type", "count", "value", "kind", "note", "at")
_WORDS = ("red", "green", "dark blue", "naïve", 'say "no"', "a\\b", "new\nline", "", "日本", "true", "1")


class Schemas:
    """Draws schemas from one random generator."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def draw(self, kind: str) -> Schema:
        """Return a schema of a kind: an object, as clients ask for, whose interesting part has that kind."""
        made: Schema = getattr(self, f"_{kind}")()
        return made

    # Leaves.

    def _enum(self) -> Schema:
        values: list[Any] = [*_WORDS, 0, -3, 2.5, True, None]
        return {"enum": self._random.sample(values, self._random.randint(1, 5))}

    def _constant(self) -> Schema:
        return {"const": self._random.choice([*_WORDS, 7, None, False])}

    def _boolean(self) -> Schema:
        return {"type": "boolean"}

    def _null(self) -> Schema:
        return {"type": "null"}

    def _integer(self) -> Schema:
        low = self._random.choice([-1000, -7, 0, 1, 1900, 123456])
        high = low + self._random.choice([0, 1, 9, 137, 100_000])
        bounds: Schema = {"minimum": low, "maximum": high}
        if self._random.random() < 0.3 and high > low + 1:
            bounds = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        if self._random.random() < 0.3 and high > low + 20:
            bounds["multipleOf"] = self._random.choice([2, 5, 10])
        return {"type": "integer", **bounds}

    def _number(self) -> Schema:
        low = self._random.choice([-90, -1, 0, 0.5, 12.25])
        bounds: Schema = {"minimum": low, "maximum": low + self._random.choice([0.25, 1, 180])}
        if self._random.random() < 0.3:
            bounds = {"exclusiveMinimum": low, "exclusiveMaximum": low + 3}
        return {"type": "number", **bounds, "multipleOf": self._random.choice([0.25, 0.5])}

    def _string(self) -> Schema:
        low = self._random.choice([0, 0, 1, 5])
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randint(0, 12)}

    def _pattern(self) -> Schema:
        choices = [r"^[A-Z]{3}-\d{4}$", r"^(\([0-9]{3}\))?[0-9]{3}-[0-9]{4}$", r"^#[0-9a-f]{6}$", r"^[\w.]{1,8}$",
                   r"^v\d{1,2}(\.\d{1,2}){0,2}$", r"^(foo|bar|bäz)?$"]  # fmt: skip
        return {"type": "string", "pattern": self._random.choice(choices)}

    def _format(self) -> Schema:
        return _format(self._random.choice(FORMATS))

    def _either_type(self) -> Schema:
        return {"type": self._random.sample(["boolean", "null"], 2)}

    def _leaf(self) -> Schema:
        leaves: list[Callable[[], Schema]] = [
            self._enum, self._constant, self._boolean, self._null, self._integer, self._number, self._string,
            self._pattern, self._format, self._either_type,
        ]  # fmt: skip
        return self._random.choice(leaves)()

    # Containers.

    def _object(self, depth: int = 1) -> Schema:
        names = self._random.sample(_NAMES, self._random.randint(1, 4))
        required = [name for name in names if self._random.random() < 0.6]
        return {
            "type": "object",
            "properties": {name: self._any(depth - 1) for name in names},
            "required": required,
            "additionalProperties": False,
        }

    def _array(self, depth: int = 1) -> Schema:
        low = self._random.randint(0, 2)
        made: Schema = {"type": "array", "minItems": low, "maxItems": low + self._random.randint(0, 3)}
        if self._random.random() < 0.3:
            first = [self._leaf() for _ in range(self._random.randint(1, 3))]
            return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}
        return {**made, "items": self._any(depth - 1)}

    def _any(self, depth: int) -> Schema:
        if depth <= 0 or self._random.random() < 0.3:
            return self._leaf()
        return self._object(depth) if self._random.random() < 0.6 else self._array(depth)

    def _nested(self) -> Schema:
        return self._object(self._random.randint(2, 4))

    def _any_of(self) -> Schema:
        either = {"anyOf": [self._object(1), self._array(1), self._leaf()][: self._random.randint(2, 3)]}
        return self._holding({**either, "description": "either"})

    def _all_of(self) -> Schema:
        low = self._random.randint(0, 50)
        both = [{"type": "integer", "minimum": low}, {"maximum": low + self._random.randint(0, 60)}]
        return self._holding({"allOf": both})

    def _recursion(self) -> Schema:
        chain = {
            "type": "object",
            "properties": {"value": self._leaf(), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        tree = {
            "type": "object",
            "properties": {
                "label": self._leaf(),
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["label"],
            "additionalProperties": False,
        }
        return {"$defs": {"node": self._random.choice([chain, tree])}, "$ref": "#/$defs/node"}

    def _formats(self) -> Schema:
        names = self._random.sample(FORMATS, 3)
        properties = {name: _format(name) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}

    def _enums(self) -> Schema:
        return self._holding(self._enum())

    def _bounds(self) -> Schema:
        return self._holding(self._integer(), self._number())

    def _strings(self) -> Schema:
        return self._holding(self._string(), self._pattern())

    def _arrays(self) -> Schema:
        return self._array(2)

    def _holding(self, *parts: Schema) -> Schema:
        properties = {f"p{i}": part for i, part in enumerate(parts)}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }


def _format(name: str) -> Schema:
    """Return a format; those whose texts may be of any length get a bound."""
    bounds = {"duration": 16, "email": 24, "time": 24, "date-time": 34}
    return {"type": "string", "format": name, **({"maxLength": bounds[name]} if name in bounds else {})}


KINDS = ("nested", "any_of", "all_of", "recursion", "formats", "enums", "bounds", "strings", "arrays")


def check_formats(value: Any, schema: Schema) -> None:
    """Validate a value by jsonschema, formats included.

    Of dates jsonschema asks more than llguidance promises: a year from 1, and 29 February in leap years alone.
    """
    checker = jsonschema.FormatChecker(["ipv4", "ipv6", "uuid", "email", "regex"])
    checker.checks("date")(lambda text: _DATE.fullmatch(text) is not None)
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(value)


_DATE = re.compile(
    r"\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-[0-2]\d)"
)


def schemas(count: int, seed: int = 0) -> list[tuple[str, Schema]]:
    """Return ``count`` schemas with names, of all kinds in turn."""
    return [(f"{KINDS[i % len(KINDS)]}-{i}", Schemas(seed + i).draw(KINDS[i % len(KINDS)])) for i in range(count)]

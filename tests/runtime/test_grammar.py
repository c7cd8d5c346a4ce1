"""Grammar: schemas that are refused before llguidance sees them, and what llguidance says of others."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

import flash_moe_mlx
from flash_moe_mlx import Grammar, RequestError
from flash_moe_mlx.installation import install_command
from flash_moe_mlx.runtime.grammar import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH, as_grammar, llguidance_tokenizer

SIZE = 2048


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(Path(flash_moe_mlx.__file__).parent / "demo")


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [3, None, [], "{", "3", "\ud800", {"a": float("nan")}, {"a": {1, 2}}, object()],
    ids=["number", "none", "list", "cut", "text-of-a-number", "surrogate", "nan", "set", "object"],
)
def test_what_is_no_schema_is_refused(schema: Any):
    with pytest.raises(RequestError, match=r"^\[schema\] must be "):
        as_grammar(schema)


def test_a_grammar_too_large_or_too_deep_is_refused_before_it_is_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llguidance.LLMatcher", None)
    huge = {"enum": ["x" * MAX_GRAMMAR_BYTES]}
    with pytest.raises(RequestError, match=f"at most {MAX_GRAMMAR_BYTES} bytes"):
        Grammar.json_schema(huge)
    with pytest.raises(RequestError, match=f"at most {MAX_GRAMMAR_BYTES} bytes"):
        Grammar.lark("a" * (MAX_GRAMMAR_BYTES + 1))
    with pytest.raises(RequestError, match="levels deep"):
        Grammar.json_schema(nested(100_000))
    with pytest.raises(RequestError, match="must be text"):
        Grammar.regex(b"a")  # type: ignore[arg-type]


PRODUCT = {"type": "integer", "allOf": [{"multipleOf": 101}, {"multipleOf": 103}, {"multipleOf": 107}]}
MULTIPLES = {
    "one": Grammar.json_schema({"type": "integer", "multipleOf": 999_983}),
    "a fraction": Grammar.json_schema({"type": "number", "multipleOf": 0.999983}),
    "a power of ten": Grammar.json_schema({"type": "integer", "multipleOf": 1e9}),
    "a product": Grammar.json_schema(PRODUCT),
    "in Lark": Grammar.lark("start: %json " + json.dumps(PRODUCT)),
    "in Lark, with escapes": Grammar.lark('start: %json {"type": "integer", "multiple\\u004ff": 999983}'),
}


@pytest.mark.parametrize("grammar", MULTIPLES.values(), ids=MULTIPLES)
def test_multiples_that_would_take_minutes_are_refused(tokenizer: TokenizerWrapper, grammar: Grammar):
    """Each took llguidance between seconds and hours."""
    with pytest.raises(RequestError, match="least common multiple"):
        grammar.compile(tokenizer, SIZE)


def test_multiples_of_every_day_compile(tokenizer: TokenizerWrapper):
    fields = {f"a{i}": {"type": "number", "multipleOf": value} for i, value in enumerate((0.01, 5, 60, 0.25, 100))}
    Grammar.json_schema({"type": "object", "properties": fields}).compile(tokenizer, SIZE)


def test_the_deepest_schema_compiles(tokenizer: TokenizerWrapper):
    Grammar.json_schema(nested(MAX_SCHEMA_DEPTH - 1)).compile(tokenizer, SIZE)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (lambda: Grammar.json_schema({"type": "foo"}), "Invalid type: foo"),
        (lambda: Grammar.json_schema({"not": {}}), "Unimplemented keys"),
        (lambda: Grammar.json_schema({"$ref": "https://example.org/schema"}), "not present in a registry"),
        (lambda: Grammar.json_schema({"enum": []}), "Unsatisfiable schema"),
        (lambda: Grammar.json_schema({"$ref": "#"}), "NoExtension"),
        (lambda: Grammar.json_schema({"allOf": [{"anyOf": [{"minimum": i + 10 * j, "type": "object", "properties":
            {f"{i}{j}": {}}} for j in range(4)]} for i in range(12)]}), "schema too large"),
        (lambda: Grammar.regex("(a|b"), "unclosed group"),
        (lambda: Grammar.lark("start: foo"), 'unknown name: "foo"'),
        (lambda: Grammar.lark("start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "too deeply nested"),
    ],
    ids=["type", "not", "remote-ref", "empty-enum", "own-ref", "product", "regex", "lark", "parentheses"],
)  # fmt: skip
def test_what_llguidance_refuses_is_quoted(tokenizer: TokenizerWrapper, grammar: Any, said: str):
    with pytest.raises(RequestError, match=rf"^\[schema\] must be a grammar that llguidance accepts, got: .*{said}"):
        grammar().compile(tokenizer, SIZE)


def test_a_schema_may_be_text_or_a_pydantic_model():
    class Pydantic:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "integer"}

    made = Grammar.json_schema({"type": "integer"})
    assert as_grammar(Pydantic) == as_grammar(json.dumps({"type": "integer"})) == made == as_grammar(made)


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=re.escape(install_command("schema"))):
        Grammar.json_object()


def test_a_tokenizer_is_converted_once(tokenizer: TokenizerWrapper):
    assert llguidance_tokenizer(tokenizer, SIZE) is llguidance_tokenizer(tokenizer, SIZE)
    assert llguidance_tokenizer(tokenizer, SIZE + 64) is not llguidance_tokenizer(tokenizer, SIZE)


def test_a_tokenizer_that_llguidance_does_not_know_is_refused():
    class Tokenizer:
        eos_token_ids = (2,)

        def __len__(self) -> int:
            return SIZE

    with pytest.raises(RequestError, match=r"\[tokenizer\] must be one that llguidance supports, got Tokenizer"):
        llguidance_tokenizer(Tokenizer(), SIZE)

"""Constraint: answers that obey a schema, thinking that stays free, and answers that would have obeyed anyway."""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from benchmarks.schemas import KINDS, check_formats, schemas
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

import flash_moe_mlx
from flash_moe_mlx import Grammar, RequestError, generate, load, stream_generate
from flash_moe_mlx.runtime import constraint as constraint_module
from flash_moe_mlx.runtime.constraint import Constraint

DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
STORY = "<|im_start|>user\nTell me a story<|im_end|>\n<|im_start|>assistant\n"
OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "minimum": 3, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Any, TokenizerWrapper]]:
    model, tokenizer = load(DEMO, max_context=2048)
    with model.streaming:
        yield model, tokenizer


@pytest.mark.parametrize(("name", "schema"), schemas(2 * len(KINDS)), ids=[name for name, _ in schemas(2 * len(KINDS))])
def test_sampled_answers_validate(demo: Any, name: str, schema: Any):
    mx.random.seed(0)
    answer = list(stream_generate(*demo, STORY, -1, schema=schema, sampler=make_sampler(1.0)))
    assert answer[-1].finish_reason == "stop"
    check_formats(json.loads("".join(response.text for response in answer)), schema)


def test_an_answer_that_obeys_is_the_free_answer(demo: Any):
    free = list(stream_generate(*demo, STORY, 40))
    text = "".join(response.text for response in free)
    bound = list(stream_generate(*demo, STORY, 40, schema=Grammar.regex(re.escape(text) + "(?s:.*)")))
    assert [r.token for r in bound] == [r.token for r in free]


def test_a_regular_expression_and_a_lark_grammar_hold(demo: Any):
    assert generate(*demo, STORY, schema=Grammar.regex("(yes|no)")) in ("yes", "no")
    assert re.fullmatch("x(ab|c)x", generate(*demo, STORY, schema=Grammar.lark('start: "x" ("ab" | "c") "x"')))


def test_a_cut_answer_says_length(demo: Any):
    answer = list(stream_generate(*demo, STORY, 5, schema=OBJECT))
    assert answer[-1].finish_reason == "length" and len(answer) == 5


def test_mlx_lm_takes_a_constraint_as_a_logits_processor(demo: Any):
    model, tokenizer = demo
    prompt = tokenizer.encode(STORY)
    constraint = Constraint(tokenizer, Grammar.json_schema(OBJECT), prompt, model.vocabulary_size)
    theirs = mlx_lm.generate(model, tokenizer, prompt, logits_processors=[constraint], max_tokens=200)
    assert theirs == generate(model, tokenizer, prompt, schema=OBJECT, max_tokens=200)
    check_formats(json.loads(theirs), OBJECT)


def test_masks_of_a_large_vocabulary_come_from_a_thread_and_are_the_same(demo: Any, monkeypatch: pytest.MonkeyPatch):
    expected = generate(*demo, STORY, schema=OBJECT)
    threads: list[str] = []
    compute = constraint_module._allowed

    def noted(matcher: Any) -> np.ndarray:
        threads.append(threading.current_thread().name)
        return compute(matcher)

    monkeypatch.setattr(constraint_module, "_SMALL_VOCABULARY", 0)
    monkeypatch.setattr(constraint_module, "_allowed", noted)
    assert generate(*demo, STORY, schema=OBJECT) == expected
    assert threads and all(name.startswith("flash-moe-mask") for name in threads)


def test_other_processors_come_first(demo: Any):
    def forbid_all_but_yes(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == demo[1].encode("y")[0], 50.0, 0.0)[None]

    answer = generate(*demo, STORY, schema=Grammar.regex("(yes|no)"), logits_processors=[forbid_all_but_yes])
    assert answer == "yes"


def test_a_model_that_runs_ahead_waits_for_each_token(demo: Any, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = demo
    expected = generate(model, tokenizer, STORY, schema=OBJECT)
    monkeypatch.setattr(type(model), "runs_ahead", property(lambda self: True, lambda self, value: None))
    assert generate(model, tokenizer, STORY, schema=OBJECT) == expected


# Without a model: which tokens are free.


@pytest.fixture(scope="module")
def thinker() -> TokenizerWrapper:
    """The demo's tokenizer with markers of thinking."""
    hub = load_tokenizer(DEMO)._tokenizer
    hub.add_tokens(["<think>", "</think>"])
    return TokenizerWrapper(hub, eos_token_ids={2})


class Writer:
    """An answer under a constraint, token by token."""

    def __init__(self, tokenizer: TokenizerWrapper, constraint: Constraint):
        self.tokenizer, self.constraint = tokenizer, constraint
        self.size = len(tokenizer)
        self._allowed: set[int] | None = None

    def allowed(self) -> set[int]:
        if self._allowed is None:  # a constraint is called once per token
            logits = self.constraint(mx.array([0]), mx.zeros((1, self.size)))
            self._allowed = set(np.flatnonzero(np.isfinite(np.array(logits)[0])).tolist())
        return self._allowed

    def write(self, text: str | Sequence[int]) -> None:
        for token in self.tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text:
            assert token in self.allowed(), self.tokenizer.decode([token])
            self.constraint.advance(token)
            self._allowed = None


def writer(tokenizer: TokenizerWrapper, prompt: str, grammar: Grammar | None, **how: Any) -> Writer:
    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    return Writer(tokenizer, Constraint(tokenizer, grammar, tokens, len(tokenizer), **how))


def test_thinking_that_the_prompt_opened_is_free(thinker: TokenizerWrapper):
    answer = writer(thinker, f"{STORY}<think>\n", Grammar.regex("yes"))
    assert len(answer.allowed()) == answer.size
    answer.write("no, or {perhaps}</think>")
    assert not {2, *thinker.encode("no")} & answer.allowed()
    answer.write("\n\n")
    assert answer.allowed() == {thinker.encode("y", add_special_tokens=False)[0]}
    answer.write("yes")
    assert answer.allowed() == {2}


def test_thinking_that_the_model_opens_is_free_and_none_is_opened_later(thinker: TokenizerWrapper):
    start = thinker.think_start_tokens[0]
    answer = writer(thinker, STORY, Grammar.regex("yes"))
    assert start in answer.allowed()
    answer.write("<think>hm</think>yes")
    plain = writer(thinker, STORY, Grammar.regex("yes"))
    plain.write("y")
    assert start not in plain.allowed()


def test_no_thinking_where_the_prompt_closed_it(thinker: TokenizerWrapper):
    answer = writer(thinker, f"{STORY}<think>\n\n</think>\n\n", Grammar.regex("yes"))
    assert thinker.think_start_tokens[0] not in answer.allowed()
    answer.write("yes")


def test_calls_are_bound_from_their_opening_to_their_end_again_and_again(thinker: TokenizerWrapper):
    opening = thinker.convert_tokens_to_ids("<tool_call>")
    call = Grammar.lark('start: "x" <[5]>')
    answer = writer(thinker, STORY, None, calls=call, opening=opening)
    for _ in range(2):
        assert len(answer.allowed()) == answer.size
        answer.write("some words")
        answer.write([opening])
        assert answer.allowed() == set(thinker.encode("x", add_special_tokens=False))
        answer.write("x")
        assert answer.allowed() == {5}
        answer.write([5])
    opened = writer(thinker, STORY, None, calls=call, opening=opening, opened=True)
    assert opened.allowed() == set(thinker.encode("x", add_special_tokens=False))


@pytest.mark.parametrize("prompt", [STORY, f"{STORY}<think>"], ids=["no-thinking", "thinking"])
def test_an_answer_is_bound_or_begins_with_a_call(thinker: TokenizerWrapper, prompt: str):
    opening = thinker.convert_tokens_to_ids("<tool_call>")
    how: dict[str, Any] = {"calls": Grammar.lark("start: <[5]>"), "opening": opening}
    answer = writer(thinker, prompt, Grammar.regex("yes"), **how)
    if "<think>" in prompt:
        answer.write("hm</think>\n")
    answer.write([opening])
    assert answer.allowed() == {5}
    answer.write([5])
    assert len(answer.allowed()) == answer.size
    text = writer(thinker, prompt, Grammar.regex("yes"), **how)
    if "<think>" in prompt:
        text.write("hm</think>\n")
    text.write("y")
    assert opening not in text.allowed()


def test_a_sampler_that_takes_another_token_is_refused(demo: Any):
    with pytest.raises(RequestError, match="must allow token 7, which the sampler took"):
        list(stream_generate(*demo, STORY, 5, schema=OBJECT, sampler=lambda logprobs: mx.array([7])))


def test_logits_may_be_more_or_fewer_than_the_mask(thinker: TokenizerWrapper):
    for size in (100, 5000):
        answer = writer(thinker, STORY, Grammar.regex("yes"))
        answer.size = size
        assert all(token < size for token in answer.allowed())

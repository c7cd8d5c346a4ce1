"""Conversations of every family, with markers in every string: rendered, said token by token, read, sent back.

What comes out is what went in, and the next prompt is the same. Cases are those of --hypothesis-seed=0 (pyproject.toml:
addopts); the seeds 2 and 6 to 25 were run too, and held.
"""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe_mlx.chat.answer import Part
from flash_moe_mlx.chat.calls import Call
from flash_moe_mlx.chat.ids import CallIds
from flash_moe_mlx.chat.marked import encode, mark
from flash_moe_mlx.chat.prompt import chat_prompt
from flash_moe_mlx.chat.reader import AnswerReader
from flash_moe_mlx.chat.shaping import shape_messages
from flash_moe_mlx.chat.template import render_templates

from ..support.chat_models import DEEPSEEK, FAMILIES, GPT_OSS, KIMI, MISTRAL, QWEN3_CODER, TOOL, Family

USER = {"role": "user", "content": "Write."}
THINKERS = {"qwen3.5", "qwen3-next", "glm-4.6", "gpt-oss", "minimax-m2", "gemma-4"}
ODD = ["<function=", "</function>", "<parameter=path>", "to=functions.f", "```json", '{"name": "x"}', "\\", '"', "é😀",
       "<b>", "&amp;", "{", "}", "[", "]", ",", ":", "'", "null", "5", "true", "\t", "\u2028", "call:f{", "<invoke>",
       "</", "think", "\ufffd"]  # fmt: skip


def words(family: Family) -> st.SearchStrategy[str]:
    pieces = st.sampled_from([*family.markers, family.eos, *ODD, *"abc xyz \n"])
    return st.lists(pieces, max_size=8).map("".join)


def said_words(family: Family) -> st.SearchStrategy[str]:
    """Words of an answer: white space at their ends is the template's."""
    return words(family).map(str.strip)


def value(family: Family, kind: str) -> st.SearchStrategy[Any]:
    inner = st.one_of(words(family), st.integers(-9, 9), st.booleans(), st.none())
    keys = st.sampled_from(["k", "key_2", "x"])
    return {
        "path": words(family).filter(fits(family)), "content": words(family).filter(fits(family)),
        "count": st.integers(-(10**12), 10**12), "deep": st.booleans() | st.none(),
        "lines": st.lists(inner, max_size=3), "options": st.dictionaries(keys, inner, max_size=3),
    }[kind]  # fmt: skip


def fits(family: Family) -> Any:
    """Return whether a value can be told from the markers around it, if a family has no quotes.

    In "mark, end of a value, another mark" nobody could.
    """
    if not family.written:
        return lambda text: True
    return lambda text: not re.search(r"</parameter>\s*(<parameter|</function|</invoke)", text)


@st.composite
def answers(draw: st.DrawFn, family: Family) -> dict[str, Any]:
    """An assistant's message."""
    names = st.lists(st.sampled_from(["path", "content", "count", "deep", "lines", "options"]), unique=True, max_size=4)
    most = 1 if family is GPT_OSS else 3
    calls = [
        {"id": CallIds("nine" if family is MISTRAL else "any").of(Call("write_file", {})), "type": "function",
         "function": {"name": "write_file", "arguments": {name: draw(value(family, name)) for name in draw(names)}}}
        for _ in range(draw(st.integers(0, most)))
    ]  # fmt: skip
    if family is KIMI:
        calls = [{**call, "id": f"functions.write_file:{i}"} for i, call in enumerate(calls)]
    message: dict[str, Any] = {"role": "assistant", "content": draw(said_words(family))}
    # A field, be it empty, says that the content is the answer alone.
    message["reasoning_content"] = draw(said_words(family)) if family.name in THINKERS else ""
    if family is GPT_OSS and calls and message.get("reasoning_content"):
        message["content"] = ""  # its template takes one of them only
    elif family is GPT_OSS and calls:
        message = {"role": "assistant", "content": "", "reasoning_content": message["content"]}
    if calls:
        message["tool_calls"] = calls
    elif not message["content"] and family is not GPT_OSS:
        message["content"] = "ok"
    return message


def rendered(family: Family, messages: list[dict[str, Any]]) -> list[int]:
    tokenizer = family.tokenizer
    shaped = mark(tokenizer, shape_messages(tokenizer, messages))
    (text,) = render_templates(tokenizer, [shaped], generate=[False], tools=[TOOL], enable_thinking=True)
    assert isinstance(text, str), text
    return encode(tokenizer, text)


def answer_tokens(family: Family, message: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The prompt, and the tokens that a model says which means the message: what the template makes of it."""
    before, _ = chat_prompt(family.tokenizer, [USER], tools=[TOOL], enable_thinking=family is not DEEPSEEK)
    whole = rendered(family, [USER, message])
    assert whole[: len(before)] == before
    said = whole[len(before) :]
    ends = [i for i, token in enumerate(said) if token == family.tokenizer.eos_token_id]
    if ends and family.name != "glm-4.6":
        said = said[: ends[-1]]
    return before, said


def message_of(family: Family, prompt: list[int], tokens: list[int], reason: str) -> dict[str, Any]:
    """The message that a client keeps of an answer."""
    reader = AnswerReader(family.tokenizer, prompt, [TOOL])
    pieces: list[Any] = []
    if reason == "stop":
        tokens = [*tokens, family.tokenizer.eos_token_id]
    for i, token in enumerate(tokens):
        pieces += reader.feed(token, reason if i == len(tokens) - 1 else None)
    ids = CallIds.for_conversation(family.tokenizer, [])
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for piece in pieces:
        if isinstance(piece, Call):
            arguments = json.dumps(piece.arguments, ensure_ascii=False)
            calls.append({"id": ids.of(piece), "type": "function",
                          "function": {"name": piece.name, "arguments": arguments}})  # fmt: skip
        elif isinstance(piece, Part) and piece.kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + piece.text
        else:
            message["content"] += piece.text
    return message | ({"tool_calls": calls} if calls else {})


def meaning(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its arguments as objects, and without ids."""
    calls = [json.loads(c["function"]["arguments"]) if isinstance(c["function"]["arguments"], str) else
             c["function"]["arguments"] for c in message.get("tool_calls", [])]  # fmt: skip
    return {
        "content": message["content"].strip(), "thinking": message.get("reasoning_content", "").strip(),
        "calls": calls,
    }  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.data())
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_comes_out_is_what_went_in(family: Family, data: st.DataObject):
    message = data.draw(answers(family))
    prompt, tokens = answer_tokens(family, message)
    came = message_of(family, prompt, tokens, "stop")
    assert meaning(came) == meaning(message)
    if family is not MISTRAL:  # whose ids are said in the text
        assert rendered(family, [USER, came]) == rendered(family, [USER, message])
    # And whatever of it was cut, no call is another one.
    cut = data.draw(st.integers(0, max(0, len(tokens) - 1)))
    some = meaning(message_of(family, prompt, tokens[:cut], "length"))["calls"] if cut else []
    assert some == meaning(message)["calls"][: len(some)]


@settings(deadline=None, max_examples=15)
@given(st.data())
@pytest.mark.parametrize("family", [f for f in FAMILIES if f is not GPT_OSS], ids=lambda family: family.name)
def test_a_question_is_never_a_mark(family: Family, data: st.DataObject):
    """Whatever a user and a tool say, no marker is among the tokens but those that the template writes."""
    text = data.draw(words(family))
    call = {"id": "functions.write_file:0" if family is KIMI else "abcdefghi", "type": "function",
            "function": {"name": "write_file", "arguments": {}}}  # fmt: skip
    shape = [{"role": "user", "content": "{}"}, {"role": "assistant", "content": "", "tool_calls": [call]},
             {"role": "tool", "tool_call_id": call["id"], "content": "{}"}]  # fmt: skip
    vocabulary = family.tokenizer.get_vocab()
    marks = {vocabulary[marker] for marker in (*family.markers, family.eos)}

    def count(word: str) -> list[int]:
        messages = [{**m, "content": m["content"].replace("{}", word)} for m in shape]
        return [token for token in chat_prompt(family.tokenizer, messages, tools=[TOOL])[0] if token in marks]

    assert count(text) == count("x")


def test_a_template_that_takes_thinking_out_of_the_content_finds_none():
    message = {"role": "assistant", "content": "Write </think> after it."}
    family = next(f for f in FAMILIES if f.name == "qwen3-next")
    assert "Write </think> after it." in family.tokenizer.decode(rendered(family, [USER, message]))
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
    shown = family.tokenizer.decode(rendered(family, [USER, thought]))
    assert "<think>\nhm\n</think>\n\nYes." in shown
    assert QWEN3_CODER.tokenizer.decode(rendered(QWEN3_CODER, [USER, thought])).count("Yes.") == 1

"""Messages in the form that each family's template takes."""

import json
from typing import Any

import pytest

from flash_moe_mlx import RequestError, chat_prompt
from flash_moe_mlx.chat.calls import Call
from flash_moe_mlx.chat.ids import CallIds
from flash_moe_mlx.chat.shaping import TemplateForm, shape_messages, shape_tools, template_form

from ..support.chat_models import (
    DEEPSEEK,
    FAMILIES,
    GEMMA,
    GLM,
    GPT_OSS,
    KIMI,
    MISTRAL,
    QWEN3_5,
    QWEN3_CODER,
    QWEN3_NEXT,
    TOOL,
    Family,
    make_tokenizer,
)  # fmt: skip

USER = {"role": "user", "content": "hi"}
ARGUMENTS = {"path": "a.txt", "count": 3}
CALL = {"id": "call_1", "type": "function", "function": {"name": "write_file", "arguments": json.dumps(ARGUMENTS)}}
LOOP = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "written"}]  # fmt: skip
BY_TURNS = """{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate') }}{%- endif %}{%- if m.role not in ('user', 'assistant') %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- endfor %}"""
NULL_CONTENT = """{%- for m in messages %}{%- if m.role == 'assistant' and m.content is none %}{%- for c in m.tool_calls %}{{- '<call>' + c.function.name + c.function.arguments + '</call>' }}{%- endfor %}{%- else %}{{- m.role + ':' + m.content }}{%- endif %}{%- endfor %}"""


def shown(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.decode(chat_prompt(tokenizer, messages, **options)[0]))


FORMS = {
    QWEN3_5: TemplateForm(several_systems=False, late_system=False), QWEN3_CODER: TemplateForm(),
    QWEN3_NEXT: TemplateForm(), GLM: TemplateForm(), KIMI: TemplateForm(), GEMMA: TemplateForm(),
    DEEPSEEK: TemplateForm(arguments_as_text=True), GPT_OSS: TemplateForm(several_systems=False, late_system=False),
    MISTRAL: TemplateForm(several_systems=False, late_system=False, any_system=False, same_role_twice=False, nine_letters=True),
}  # fmt: skip


@pytest.mark.parametrize("family", FORMS, ids=lambda family: family.name)
def test_forms(family: Family):
    assert template_form(family.tokenizer) == FORMS[family]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "sys A"}, {"role": "system", "content": "sys B"}, USER],
        [{"role": "system", "content": "sys A"}, {"role": "developer", "content": "sys B"}, USER],
        [{"role": "system", "content": "sys A"}, USER, {"role": "assistant", "content": "x"},
         {"role": "system", "content": "sys B"}, USER],
        [USER, {"role": "assistant", "content": "x"}, {"role": "developer", "content": "sys A sys B"}, USER],
        [{"role": "developer", "content": [{"type": "text", "text": "sys A "}, {"type": "text", "text": "sys B"}]}, USER],
    ],
)  # fmt: skip
def test_system_messages_are_never_lost(family: Family, messages: list[dict[str, Any]]):
    text = shown(family.tokenizer, messages)
    assert "sys A" in text and "sys B" in text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("arguments", [json.dumps(ARGUMENTS), ARGUMENTS, json.dumps(json.dumps(ARGUMENTS))])
def test_arguments_come_as_the_template_wants_them(family: Family, arguments: Any):
    call = {**CALL, "function": {**CALL["function"], "arguments": arguments}}
    text = shown(family.tokenizer, [USER, {**LOOP[1], "tool_calls": [call]}, LOOP[2]], tools=[TOOL])
    assert "a.txt" in text and "written" in text and '\\"' not in text and "'path'" not in text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_histories_that_end_anywhere(family: Family):
    """Results without ids, calls without results, messages without content, questions after each other."""
    none = {"role": "assistant", "content": None}
    for messages in (
        [USER, none, USER], [USER, USER], [USER, LOOP[1], {"role": "tool", "content": "3"}],
        [USER, {**LOOP[1], "tool_calls": [{**CALL, "id": None}]}, {"role": "tool", "content": None}, USER],
        [USER, {**LOOP[1], "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"path": '}}]}, LOOP[2]],
        [USER, {**LOOP[1], "content": "", "tool_calls": []}, USER],
    ):  # fmt: skip
        assert "hi" in shown(family.tokenizer, messages)


def test_ids_are_in_the_templates_form():
    shaped = shape_messages(MISTRAL.tokenizer, LOOP)
    given = shaped[1]["tool_calls"][0]["id"]
    assert len(given) == 9 and given.isalnum() and shaped[2]["tool_call_id"] == given
    assert shape_messages(MISTRAL.tokenizer, LOOP) == shaped
    shaped = shape_messages(KIMI.tokenizer, [*LOOP, *LOOP])
    assert [m["tool_call_id"] for m in shaped if m["role"] == "tool"] == [
        "functions.write_file:0",
        "functions.write_file:1",
    ]
    assert shape_messages(QWEN3_CODER.tokenizer, LOOP)[2]["tool_call_id"] == "call_1"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_new_ids(family: Family):
    shaped = shape_messages(family.tokenizer, LOOP)
    ids = CallIds.for_conversation(family.tokenizer, shaped)
    given = [ids.of(Call("f", {}, own)) for own in (None, "functions.f:0", "abcdefghi", "abcdefghi", None)]
    assert len(set(given)) == 5
    if family is MISTRAL:
        assert all(len(call_id) == 9 and call_id.isalnum() for call_id in given) and given[2] == "abcdefghi"
    if family is KIMI:
        assert given[:2] == ["functions.f:1", "functions.f:0"]


def test_templates_that_know_no_system_and_no_tools():
    tokenizer = make_tokenizer(BY_TURNS, ("<s>",), "</s>")
    text = shown(
        tokenizer, [{"role": "system", "content": "sys"}, *LOOP, {"role": "assistant", "content": "ok"}, USER, USER]
    )
    assert text.startswith("[INST] sys\n\nhi [/INST]") and "a.txt" in text and "written" in text
    assert text.endswith("[INST] hi\n\nhi [/INST]")


def test_calls_of_templates_that_want_their_content_null():
    tokenizer = make_tokenizer(NULL_CONTENT, ("<s>",), "</s>")
    assert template_form(tokenizer) == TemplateForm(arguments_as_text=True, null_content=True)
    text = shown(tokenizer, [USER, {**LOOP[1], "content": "I write."}, LOOP[2]])
    assert "assistant:I write.<call>write_file" in text and "a.txt" in text


def test_null_descriptions_are_dropped():
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": None, "default": None}}}
    tool = {
        "type": "function",
        "function": {"name": "f", "description": None, "parameters": parameters, "strict": None},
    }
    (shaped,) = shape_tools([tool])
    assert shaped == {"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"a": {"type": "string", "default": None}}}}}  # fmt: skip
    assert "// \n" in shown(GPT_OSS.tokenizer, [USER], tools=[tool])
    assert "// Write.\n" in shown(GPT_OSS.tokenizer, [USER], tools=[TOOL])


def test_variables_go_through():
    shows = make_tokenizer(
        "{{ messages[0].content }} {{ reasoning_effort }} {{ enable_thinking }} {{ x }}", ("<s>",), "</s>"
    )
    assert shown(shows, [USER], reasoning_effort="high", enable_thinking=False, x=[1]) == "hi high False [1]"
    assert shown(DEEPSEEK.tokenizer, [USER], enable_thinking=True).endswith("<think>")
    assert shown(DEEPSEEK.tokenizer, [USER], enable_thinking=False).endswith("</think>")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('Say it in verse.') }}", "{{ 1 + 'a' }}", "{{ messages.x.y }}"]
)
def test_what_a_template_raises_is_quoted(template: str):
    with pytest.raises(RequestError, match=r"verse|TypeError|no attribute"):
        chat_prompt(make_tokenizer(template, ("<s>",), "</s>"), [USER])


def test_messages_that_are_no_objects():
    with pytest.raises(RequestError, match="objects"):
        shape_messages(QWEN3_CODER.tokenizer, [USER, "hi"])

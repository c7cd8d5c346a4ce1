"""Conversations: the tool loop on scripted answers in both forms of tool calls, and on the embedded model."""

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flash_moe_mlx import Grammar, PrefixCache, RequestError, load
from flash_moe_mlx.chat import conversation as module
from flash_moe_mlx.chat.answer import Part
from flash_moe_mlx.chat.conversation import AnswerEnd, Conversation, ToolCall, ToolOutcome
from flash_moe_mlx.chat.tools import CALCULATOR, load_tools

from ..support.chat_models import DEEPSEEK, GPT_OSS, KIMI, MISTRAL, QWEN3_5, QWEN3_CODER

DEMO = files("flash_moe_mlx") / "demo"

TOOLS = '''
def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: One.
        b: Another.
    """
    return a + b

def shout(text: str):
    """Shout.

    Args:
        text: What.
    """
    return text.upper()
'''


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Any, Any]]:
    model, tokenizer = load(DEMO, max_context=512)
    with model.streaming:
        yield model, tokenizer


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> list:
    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS)
    return load_tools(path)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets what the model will say, generation by generation."""

    def play(*answers: str) -> list[Sequence[int]]:
        left, prompts = list(answers), []

        def stream_generate(model: Any, tokenizer: Any, prompt: Sequence[int], *_: Any, **__: Any) -> Iterator[Any]:
            prompts.append(prompt)
            for token in tokenizer.encode(left.pop(0), add_special_tokens=False):
                yield SimpleNamespace(token=token, finish_reason=None)
            yield SimpleNamespace(token=tokenizer.eos_token_id, finish_reason="stop")

        monkeypatch.setattr(module, "stream_generate", stream_generate)
        return prompts

    return play


def json_call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def xml_call(name: str, **arguments: Any) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


@pytest.mark.parametrize("call", [json_call, xml_call])
def test_calls_of_both_forms_are_run(demo, tools, script, call):
    prompts = script("I add.\n" + call("add", a=2, b=40) + "\n" + call("shout", text="<b> &\nc"), "Done.")
    asked: list[ToolCall] = []
    chat = Conversation(*demo, system="Be brief.", tools=tools, confirm=lambda c: asked.append(c) or True)
    events = list(chat.send("Go."))
    assert [type(e).__name__ for e in events if not isinstance(e, Part)] == [
        "AnswerEnd", "ToolCall", "ToolOutcome", "ToolCall", "ToolOutcome", "AnswerEnd",
    ]  # fmt: skip
    assert [e.result.text for e in events if isinstance(e, ToolOutcome)] == ["42", "<B> &\nC"]
    assert [(c.name, c.arguments) for c in asked] == [("add", {"a": 2, "b": 40}), ("shout", {"text": "<b> &\nc"})]
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [m["content"] for m in chat.messages] == ["Go.", "I add.", "42", "<B> &\nC", "Done."]
    calls = chat.messages[1]["tool_calls"]
    assert [c["id"] for c in calls] == [m["tool_call_id"] for m in chat.messages[2:4]] == ["call_1", "call_2"]
    second = demo[1].decode(list(prompts[1]))
    assert "Be brief." in second and "<tool_response>\n42\n</tool_response>" in second


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (json_call("add", a=1), "TypeError: add() missing 1 required positional argument: 'b'"),
        (json_call("fly"), "there is no tool fly, only add, shout"),
        ("<tool_call>{not json}</tool_call>", "the call can't be read"),
        ('<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', "the call can't be read"),
        ('<tool_call>["add"]</tool_call>', "the call can't be read"),
        ('<tool_call>{"arguments": {}}</tool_call>', "the call can't be read"),
        ("<tool_call>3</tool_call>", "the call can't be read"),
        ('<tool_call>{"name": "add", "argu', "the call can't be read"),
    ],
)
def test_the_model_is_told_what_is_wrong_with_a_call(demo, tools, script, call: str, error: str):
    script(call, "I see.")
    chat = Conversation(*demo, tools=tools, confirm=lambda _: True)
    list(chat.send("Go."))
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert error in json.loads(chat.messages[2]["content"])["error"]


def test_arguments_may_be_json_in_a_text(demo, tools, script):
    script(f"<tool_call>{json.dumps({'name': 'add', 'arguments': json.dumps({'a': 1, 'b': 2})})}</tool_call>", "3")
    chat = Conversation(*demo, tools=tools, confirm=lambda _: True)
    list(chat.send("Go."))
    assert chat.messages[2]["content"] == "3"


def test_a_refused_call_is_not_run_and_refusing_is_the_default(demo, script, tmp_path: Path):
    path = tmp_path / "tools.py"
    path.write_text(f'def touch():\n    "Write."\n    open({str(tmp_path / "file")!r}, "w")\n')
    for answers, kept in (((), False), ((lambda call: True,), True)):
        script(json_call("touch"), "Well.")
        chat = Conversation(*demo, tools=load_tools(path), **dict(zip(("confirm",), answers, strict=False)))
        list(chat.send("Go."))
        assert (tmp_path / "file").exists() == kept
        assert chat.messages[2]["content"] == ("null" if kept else '{"error": "refused by the user"}')


def test_rounds_are_bounded(demo, tools, script):
    script(*[json_call("add", a=1, b=1)] * 9)
    chat = Conversation(*demo, tools=tools, confirm=lambda _: True, max_tool_rounds=2)
    outcomes = [e.result for e in chat.send("Go.") if isinstance(e, ToolOutcome)]
    assert [r.ok for r in outcomes] == [True, True, False]
    assert outcomes[-1].text == module.TOO_MANY


def test_without_tools_a_call_is_text(demo, script):
    script(json_call("add", a=1, b=1))
    chat = Conversation(*demo)
    list(chat.send("Go."))
    assert chat.messages[-1]["content"].startswith("<tool_call>")


def test_an_answer_that_is_left_keeps_what_was_said(demo, tools, script):
    script("Once upon a time", '<tool_call>{"never whole', json_call("add", a=1, b=1) + json_call("add", a=2, b=2))
    chat = Conversation(*demo, tools=tools, confirm=lambda _: True)
    events = chat.send("Tell.")
    said = "".join(next(events).text for _ in range(3))
    events.close()
    assert chat.messages[1:] == [{"role": "assistant", "content": said}] and "Once upon a time".startswith(said)
    events = chat.send("Interrupted before anything is said.")
    chat.progress = None
    next(events).response  # noqa: B018 - the call that can't be read
    events.close()
    assert chat.messages[-1]["role"] == "tool"
    events = chat.send("Call.")
    assert [type(next(events)) for _ in range(3)] == [AnswerEnd, ToolCall, ToolOutcome]
    events.close()
    assert [m["content"] for m in chat.messages[-2:]] == ["2", '{"error": "interrupted by the user"}']


def test_a_question_without_an_answer_is_forgotten(demo, tools):
    chat = Conversation(*demo, tools=tools)
    with pytest.raises(RequestError, match="max_context"):
        list(chat.send("word " * 1000))
    assert chat.messages == []


def test_thinking_is_kept_apart(demo, script):
    script("Let me see.\n</think>\n\nIt is 4.", "</think>\n\nIt is 5.")
    chat = Conversation(demo[0], QWEN3_5.tokenizer)
    kinds = {part.kind for part in chat.send("2 + 2?") if isinstance(part, Part)}
    assert kinds == {"thinking", "text"}
    assert chat.messages[-1] == {"role": "assistant", "content": "It is 4.", "reasoning_content": "Let me see."}
    list(chat.send("And 1?"))
    assert chat.messages[-1] == {"role": "assistant", "content": "It is 5."}


@pytest.mark.parametrize(
    ("family", "said", "ids"),
    [
        (KIMI, "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:7<|tool_call_argument_begin|>"
         '{"a": 1, "b": 2}<|tool_call_end|><|tool_calls_section_end|>', ["functions.add:7"]),
        (QWEN3_CODER, xml_call("add", a=1, b=2), ["call_1"]),
        (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2}}]', None),
        (DEEPSEEK, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2}<｜tool▁call▁end｜>'
         "<｜tool▁calls▁end｜>", ["call_1"]),
        (GPT_OSS, '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1, "b": 2}<|call|>',
         ["call_1"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_a_tool_loop_of_every_family(demo, tools, script, family: Any, said: str, ids: list[str] | None):
    script(said, "It is 3.", "</think>Yes." if family is DEEPSEEK else "Yes.")
    chat = Conversation(demo[0], family.tokenizer, system="Be brief.", tools=tools, confirm=lambda _: True)
    outcomes = [event.result.text for event in chat.send("1 + 2?") if isinstance(event, ToolOutcome)]
    assert outcomes == ["3"]
    calls = chat.messages[1]["tool_calls"]
    given = [call["id"] for call in calls]
    assert given == ids if ids else all(len(call_id) == 9 and call_id.isalnum() for call_id in given)
    list(chat.send("Sure?"))
    assert chat.messages[-1]["content"] == "Yes."


def test_models_without_the_means_are_refused(demo, tools):
    with pytest.raises(RequestError, match="tool calls"):
        Conversation(None, SimpleNamespace(has_chat_template=True, has_tool_calling=False), tools=tools)
    with pytest.raises(RequestError, match="chat template"):
        Conversation(None, SimpleNamespace(has_chat_template=False))


def test_the_embedded_model_calculates_over_two_turns(demo):
    model, tokenizer = demo
    with PrefixCache(model, "20MB") as cache:
        chat = Conversation(
            model, tokenizer, tools=load_tools(CALCULATOR), confirm=lambda _: True, prefix_cache=cache, max_tokens=64
        )
        for question, result in (("What is 17 + 25?", "42"), ("Use the calculator for 12 * 12.", "144")):
            events = list(chat.send(question))
            assert [e.result.text for e in events if isinstance(e, ToolOutcome)] == [result]
            assert result in chat.messages[-1]["content"]
            ends = [e.response for e in events if isinstance(e, AnswerEnd)]
            assert len(ends) == 2
            assert ends[1].cached_tokens > ends[0].prompt_tokens  # the answer's own tokens, too
        assert ends[0].cached_tokens > ends[0].prompt_tokens / 2  # the first turn was not read again


def test_an_answer_obeys_a_schema(demo: Any):
    chat = Conversation(*demo)
    text = "".join(e.text for e in chat.send("Is 7 prime?", schema=Grammar.regex("(yes|no)")) if isinstance(e, Part))
    assert text in ("yes", "no")
    assert chat.messages[-1]["content"] == text


def test_a_schema_that_is_none_leaves_the_conversation_as_it_was(demo: Any):
    chat = Conversation(*demo)
    with pytest.raises(RequestError, match="Invalid type"):
        list(chat.send("Hello", schema={"type": "foo"}))
    assert chat.messages == []


def test_a_schema_comes_without_tools(demo: Any):
    with pytest.raises(RequestError, match="must come without tools"):
        list(Conversation(*demo, tools=[CALCULATOR]).send("Hello", schema={"type": "object"}))

"""Bodies that are wrong are refused with the field's name; what is right is understood."""

import json
import random
from typing import Any

import pytest

from flash_moe_mlx.server.api_error import ApiError
from flash_moe_mlx.server.schema import Sampling, parse_chat, parse_completion

from ..support.serving import SUM, WEATHER_TOOL

VOCABULARY = 1000


def chat(**body: Any) -> Any:
    return parse_chat({"messages": SUM, **body}, "demo", VOCABULARY, Sampling())


def completion(**body: Any) -> Any:
    return parse_completion({"prompt": "Hi", **body}, "demo", VOCABULARY, Sampling())


WRONG_CHAT: list[tuple[str, Any]] = [
    ("messages", None), ("messages", []), ("messages", "Hi"), ("messages", [1]), ("messages", [{}]),
    ("messages", [{"role": "boss", "content": "Hi"}]), ("messages", [{"role": [], "content": "Hi"}]),
    ("messages", [{"role": "user"}]), ("messages", [{"role": "user", "content": 3}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": None}]}]),
    ("messages", [{"role": "user", "content": "Hi", "tool_calls": [{"function": {"name": "f"}}]}]),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": 3, "arguments": "{}"}}]}]),
    ("messages", [{"role": "assistant", "tool_calls": ["f"]}]),
    ("tools", {}), ("tools", [1]), ("tools", [{"type": "web"}]), ("tools", [{"type": "function"}]),
    ("tools", [{"type": "function", "function": {"name": "a b"}}]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"properties": [1]}}}]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": 1}}}}]),
    ("tools", [WEATHER_TOOL] * 129), ("tool_choice", "required"), ("tool_choice", 3), ("tool_choice", {"function": []}),
    ("top_logprobs", 3), ("logprobs", 3), ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
    ("chat_template_kwargs", [1]), ("parallel_tool_calls", 1), ("max_completion_tokens", 0),
]  # fmt: skip
WRONG_BOTH: list[tuple[str, Any]] = [
    ("model", 3), ("n", 2), ("n", "1"), ("stream", "yes"), ("stream_options", [1]),
    ("temperature", "hot"), ("temperature", -0.1), ("temperature", 2.1), ("temperature", True), ("temperature", [1]),
    ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", 10**400), ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2), ("top_k", 1.5), ("min_p", 2), ("seed", "a"), ("seed", 2**64), ("repetition_penalty", 0),
    ("repetition_penalty", 1e-45), ("stop", "a" * 1001), ("stop", ["b", "a" * 4_000_000]),
    ("presence_penalty", 3), ("frequency_penalty", -3), ("logit_bias", [1]), ("logit_bias", {"a": 1}),
    ("logit_bias", {"1000": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": "x"}),
    ("logit_bias", {"٣": 1}), ("logit_bias", {str(i): 1 for i in range(1025)}), ("stop", 3),
    ("stop", ["a"] * 1001), ("stop", [3]), ("max_tokens", 0), ("max_tokens", -5),
    ("max_tokens", 1.0), ("max_tokens", "9"),
    ("response_format", {"type": "json_schema"}), ("response_format", "text"),
    ("functions", [{"name": "f"}]), ("suffix", "x"),
]  # fmt: skip
WRONG_COMPLETION: list[tuple[str, Any]] = [
    ("prompt", None), ("prompt", ""), ("prompt", []), ("prompt", ["a", "b"]), ("prompt", [1, 1000]), ("prompt", [-1]),
    ("prompt", [1, "a"]), ("prompt", [True]), ("prompt", {"text": "Hi"}), ("echo", True), ("best_of", 2),
    ("logprobs", True), ("logprobs", 99),
]  # fmt: skip


@pytest.mark.parametrize(
    ("parse", "name", "value"),
    [(chat, *pair) for pair in WRONG_CHAT + WRONG_BOTH]
    + [(completion, *pair) for pair in WRONG_COMPLETION + WRONG_BOTH],
    ids=lambda value: str(value)[:40] if not callable(value) else value.__name__,
)
def test_wrong_values_are_refused(parse: Any, name: str, value: Any):
    with pytest.raises(ApiError) as refused:
        parse(**{name: value})
    assert refused.value.status in (400, 404)
    assert name in refused.value.message
    error = json.loads(json.dumps(refused.value.body))["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 400


def test_usage_is_asked_for_with_true_or_false():
    assert chat(stream_options={"include_usage": True}).include_usage
    with pytest.raises(ApiError, match="include_usage"):
        chat(stream_options={"include_usage": 1})


@pytest.mark.parametrize("body", [None, [], "x", 3, True])
def test_a_body_is_an_object(body: Any):
    with pytest.raises(ApiError, match="JSON object"):
        parse_chat(body, "demo", VOCABULARY, Sampling())


def test_null_is_not_given():
    names = {name for name, _ in WRONG_CHAT + WRONG_BOTH} - {"messages"}
    assert chat(**dict.fromkeys(names)) == chat()
    assert chat().max_tokens is None and completion().max_tokens == 16


def test_tools_need_no_description_and_no_parameters():
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}
    assert chat(tools=[tool]).tools == [tool]
    assert chat(tools=[tool], tool_choice="none").tools is None


def test_defaults_are_the_servers():
    defaults = Sampling(temperature=0.7, top_p=0.8, top_k=20)
    request = parse_chat({"messages": SUM, "top_p": 0.5, "unknown": 1}, "demo", VOCABULARY, defaults)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.7, 0.5, 20)


def test_messages_are_brought_to_the_templates_form():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    request = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert request.messages == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "assistant", "content": "", "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]  # fmt: skip
    assert request.template_arguments == {"enable_thinking": False}


def history(*messages: dict) -> list:
    return chat(messages=[*SUM, *messages, *SUM]).messages[1:-1]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "assistant", "content": None}, ""), ({"role": "assistant", "content": None, "tool_calls": []}, ""),
        ({"role": "assistant"}, ""), ({"role": "assistant", "content": None, "tool_calls": None}, ""),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "no"), ({"role": "assistant", "content": []}, ""),
        ({"role": "tool", "tool_call_id": "1", "content": None}, ""), ({"role": "tool", "content": []}, ""),
        ({"role": "user", "content": None}, ""), ({"role": "system", "content": None}, ""),
        ({"role": "function", "name": "f", "content": "3"}, "3"),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": ""}]}, "a"),
    ],
)  # fmt: skip
def test_contents_of_other_servers_histories(message: dict, content: str):
    (read,) = history(message)
    assert read["content"] == content and "tool_calls" not in read


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}), ("null", {}), (None, {}), ("{}", {}), ("  ", {}), ({"a": 1}, {"a": 1}), ('{"a": 1}', {"a": 1}),
        ('{"path": ', {"arguments": '{"path": '}), ("[1]", {"arguments": [1]}), ("a.txt", {"arguments": "a.txt"}),
        ('"{\\"a\\": 1}"', {"a": 1}), ('{"a": "\\ud83d"}', {"a": "\ufffd"}), ("[" * 5000, {"arguments": "[" * 5000}),
        ('{"a": NaN}', {"arguments": '{"a": NaN}'}),
    ],
)  # fmt: skip
def test_arguments_of_other_servers_histories(arguments: Any, expected: dict):
    call = {"id": "1", "function": {"name": "no such!", "arguments": arguments}}
    (read,) = history({"role": "assistant", "content": None, "tool_calls": [call]})
    assert read["tool_calls"][0]["function"] == {"name": "no such!", "arguments": expected}
    (older,) = history({"role": "assistant", "content": None, "function_call": call["function"]})
    assert older["tool_calls"][0]["function"]["arguments"] == expected


def test_values_that_local_clients_send():
    assert chat(max_tokens=-1).max_tokens is None and chat(max_completion_tokens=-1).max_tokens is None
    assert completion(max_tokens=-1).max_tokens is None and completion().max_tokens == 16
    assert chat(top_k=-1).sampling.top_k == 0
    assert chat(stop=[f"s{i}" for i in range(50)]).stop == tuple(f"s{i}" for i in range(50))
    for nothing in ("", [], [""], None):
        assert chat(stop=nothing).stop == ()
    for name in ("functions", "tools", "logit_bias", "suffix", "function_call", "audio", "response_format"):
        assert chat(**{name: {} if name in ("logit_bias", "response_format") else []}) == chat()
    assert chat(function_call="none", tool_choice="auto") == chat()
    for name in ("logit_bias", "stream_options", "chat_template_kwargs", "response_format"):  # PHP's empty objects
        assert chat(**{name: []}) == chat()
    assert chat(model="", tool_choice="", reasoning_effort="", top_logprobs=0, logprobs=False) == chat()
    assert chat(seed=-1).sampling.seed is None and chat(seed=-2).sampling.seed == -2


def test_variables_of_templates():
    given = {"enable_thinking": True, "preserve_thinking": True, "thinking": True, "reasoning_effort": "high", "x": [1]}
    assert chat(chat_template_kwargs=given).template_arguments == given
    top = {"enable_thinking": False, "preserve_thinking": True, "reasoning_effort": "low"}
    assert chat(**top).template_arguments == top
    assert chat(**top, chat_template_kwargs={"enable_thinking": True}).template_arguments["enable_thinking"] is True
    assert chat(reasoning_effort="none").template_arguments["enable_thinking"] is False
    for ours in ("chat_template", "tools", "messages", "add_generation_prompt", "tokenize", "continue_final_message"):
        with pytest.raises(ApiError, match="chat_template_kwargs"):
            chat(chat_template_kwargs={ours: 1})


def test_schemas_may_be_boolean():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": True, "b": False}}}}
    assert chat(tools=[tool]).tools == [tool]


def test_a_batch_of_one():
    assert completion(prompt=["Hi"]).prompt == "Hi"
    assert completion(prompt=[[1, 2]]).prompt == completion(prompt=[1, 2]).prompt == [1, 2]


def test_no_body_is_answered_with_another_exception():
    """Random values in random places, some of them deep: a refusal or a request, nothing else."""
    r = random.Random(0)
    names = [name for name, _ in WRONG_CHAT + WRONG_BOTH]
    values = [value for _, value in WRONG_CHAT + WRONG_BOTH + WRONG_COMPLETION] + [
        None,
        {},
        [],
        "",
        0,
        -1,
        1e308,
        {"": {}},
    ]

    def mutated(value: Any) -> Any:
        if isinstance(value, dict) and value and r.random() < 0.8:
            key = r.choice(list(value))
            return {**value, key: mutated(value[key])}
        if isinstance(value, list) and value and r.random() < 0.8:
            i = r.randrange(len(value))
            return [*value[:i], mutated(value[i]), *value[i + 1 :]]
        return r.choice(values)

    calls = [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]
    good = {"messages": [*SUM, {"role": "assistant", "tool_calls": calls}],
            "tools": [WEATHER_TOOL], "logit_bias": {"1": 2}, "stop": ["a"], "prompt": "Hi"}  # fmt: skip
    refused = 0
    for _ in range(3000):
        body = mutated({**good, r.choice(names): r.choice(values)})
        for parse in (parse_chat, parse_completion):
            try:
                parse(body, "demo", VOCABULARY, Sampling())
            except ApiError as error:
                refused += 1
                json.dumps(error.body, allow_nan=False)
    assert 1000 < refused < 6000

"""The official client against the embedded model."""

import json
import time
from collections.abc import Iterator

import openai
import pytest

from ..support.serving import STORY, SUM, WEATHER, WEATHER_TOOL, client, demo

pytestmark = pytest.mark.xdist_group("server")  # they share one server


@pytest.fixture(scope="module")
def api() -> Iterator[openai.OpenAI]:
    with demo() as address:
        yield client(address)


@pytest.fixture(scope="module")
def tokens(api: openai.OpenAI) -> list[str]:
    """Return the model's answer to SUM."""
    answer = api.chat.completions.create(model="demo", messages=SUM, logprobs=True)
    return [token.token for token in answer.choices[0].logprobs.content]


def test_models(api: openai.OpenAI):
    assert [model.id for model in api.models.list()] == ["demo"]
    found = api.models.retrieve("demo")
    assert found.id == "demo" and abs(found.created - time.time()) < 3600
    assert found.default_sampling == {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    with pytest.raises(openai.NotFoundError, match="'demo'"):
        api.models.retrieve("gpt-none")
    with pytest.raises(openai.NotFoundError, match="'demo'"):
        api.chat.completions.create(model="gpt-none", messages=SUM)


def test_chat(api: openai.OpenAI, tokens: list[str]):
    answer = api.chat.completions.create(model="demo", messages=SUM)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "".join(tokens), "stop")
    assert "42" in choice.message.content
    assert choice.logprobs is None and choice.message.tool_calls is None
    assert answer.object == "chat.completion" and answer.model == "demo" and answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == 20
    assert answer.usage.completion_tokens == len(tokens) + 1  # the end token
    assert answer.usage.total_tokens == 20 + len(tokens) + 1


def test_stream_is_the_same_answer(api: openai.OpenAI, tokens: list[str]):
    chunks = list(
        api.chat.completions.create(model="demo", messages=SUM, stream=True, stream_options={"include_usage": True})
    )
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "".join(tokens)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    assert len(chunks) > 5, "it came in one piece"
    usages = [chunk.usage for chunk in chunks]
    assert usages[:-1] == [None] * (len(chunks) - 1)
    assert usages[-1].completion_tokens == len(tokens) + 1
    without = list(api.chat.completions.create(model="demo", messages=SUM, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_logprobs(api: openai.OpenAI, tokens: list[str], stream: bool):
    options = {"model": "demo", "messages": SUM, "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = api.chat.completions.create(**options, stream=True)
        logprobs = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    else:
        logprobs = api.chat.completions.create(**options).choices[0].logprobs.content
    assert [t.token for t in logprobs] == tokens
    assert b"".join(bytes(t.bytes) for t in logprobs).decode() == "".join(tokens)
    for token in logprobs:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, values[0])  # greedy
        assert -20 < values[0] <= 0
    assert (
        api.chat.completions.create(**{**options, "top_logprobs": 0}).choices[0].logprobs.content[0].top_logprobs == []
    )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_tools_round_trip(api: openai.OpenAI, stream: bool):
    messages: list = list(WEATHER)
    options = {"model": "demo", "tools": [WEATHER_TOOL], "messages": messages}
    if stream:
        with api.chat.completions.stream(**options) as events:  # the client puts the pieces together
            choice = events.get_final_completion().choices[0]
    else:
        choice = api.chat.completions.create(**options).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content in (None, "")
    assert call.function.name == "get_weather" and call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "Lisbon"}
    messages.append(choice.message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"temperature": 17})})
    answer = api.chat.completions.create(**options)
    assert answer.choices[0].message.content == "The temperature is 17."
    assert answer.choices[0].finish_reason == "stop"


def test_tool_choice(api: openai.OpenAI):
    options = {"model": "demo", "messages": STORY, "tools": [WEATHER_TOOL], "max_tokens": 60}
    assert "fox" in api.chat.completions.create(**options, tool_choice="none").choices[0].message.content
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        (call,) = api.chat.completions.create(**options, tool_choice=choice).choices[0].message.tool_calls
        assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        api.chat.completions.create(**options, tool_choice={"type": "function", "function": {"name": "other"}})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("others", [[], ["zzz", "qqq"]], ids=["one", "several"])
def test_stop_across_tokens(api: openai.OpenAI, tokens: list[str], others: list[str], stream: bool):
    said = "".join(tokens)
    expected = said[: len(said) // 2]
    stop = said[len(expected) :][:5]  # longer than a token, and cut where no token begins or ends perhaps
    options = {"model": "demo", "messages": SUM, "stop": [stop, *others] if others else stop}
    assert max(len(token) for token in tokens) <= len(stop)
    if stream:
        chunks = list(api.chat.completions.create(**options, stream=True))
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = api.chat.completions.create(**options).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (said[: said.index(stop)], "stop")


def test_max_tokens(api: openai.OpenAI, tokens: list[str]):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = api.chat.completions.create(model="demo", messages=SUM, **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].message.content == "".join(tokens[:3])


def test_sampling(api: openai.OpenAI):
    def say(**options: object) -> str:
        options = {"model": "demo", "prompt": "The", "max_tokens": 6, **options}
        return api.completions.create(**options).choices[0].text

    greedy = say()
    warm = {"temperature": 2, "extra_body": {"repetition_penalty": 9.0}}  # the model is sure of what it says
    assert say(seed=1, **warm) == say(seed=1, **warm)
    assert len({say(seed=seed, **warm) for seed in range(4)}) > 1
    assert len({say(**warm) for _ in range(3)}) > 1, "without a seed each answer is drawn anew, after a seeded one too"
    assert say(temperature=2, extra_body={"top_k": 1}) == greedy
    assert say(temperature=2, extra_body={"min_p": 1.0}) == greedy
    assert say(temperature=2, top_p=1e-6) == greedy
    assert say(extra_body={"repetition_penalty": 9.0}) != greedy
    assert set(say(logit_bias={"400": 100}).split("ye")) == {""}  # token 400, six times


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_completions(api: openai.OpenAI, stream: bool):
    options = {"model": "demo", "prompt": "Once there was", "max_tokens": 12, "logprobs": 2}
    if stream:
        choices = [chunk.choices[0] for chunk in api.completions.create(**options, stream=True)]
        text, reason = "".join(choice.text for choice in choices), choices[-1].finish_reason
        tokens = [token for choice in choices for token in choice.logprobs.tokens]
    else:
        answer = api.completions.create(**options)
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        logprobs = answer.choices[0].logprobs
        tokens = logprobs.tokens
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 12
        assert all(len(top) == 2 for top in logprobs.top_logprobs)
        assert answer.usage.completion_tokens == 12 and answer.object == "text_completion"
    assert reason == "length"
    assert "".join(tokens).strip() == text.strip() != ""


def test_completion_of_token_ids(api: openai.OpenAI):
    answer = api.completions.create(model="demo", prompt=[400, 401, 402], max_tokens=2)
    assert answer.usage.prompt_tokens == 3


def test_history_is_read_and_cached(api: openai.OpenAI):
    """Earlier messages decide the answer, and their beginning is not computed again."""
    facts = [{"role": "system", "content": "Ana has a red boat. Bob has a blue kite. Eva has a green coat. " * 3}]
    messages = [*facts, {"role": "user", "content": "What does Ana have?"}]
    first = api.chat.completions.create(model="demo", messages=messages)
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append(
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "17 + 25?"}]}
    )
    second = api.chat.completions.create(model="demo", messages=messages)
    assert "boat" in first.choices[0].message.content
    assert "42" in second.choices[0].message.content
    read = second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens
    assert 0 < read < 40 < second.usage.prompt_tokens


def test_what_is_not_supported_is_refused(api: openai.OpenAI):
    for options in ({"n": 2}, {"functions": [{"name": "f"}]}):
        with pytest.raises(openai.BadRequestError, match=next(iter(options))) as refused:
            api.chat.completions.create(model="demo", messages=SUM, **options)
        assert refused.value.type == "invalid_request_error" and refused.value.param == next(iter(options))

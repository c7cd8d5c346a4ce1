"""Anthropic's API by its official client: messages whole and streamed, tools, thinking, errors, models."""

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from flash_moe_mlx.server import app

from ..support.chat_models import KIMI, QWEN3_5, QWEN3_NEXT
from ..support.scripted import Script, scripted
from ..support.serving import post

pytestmark = pytest.mark.xdist_group("clients")  # they share one model

TOOL: Any = {"name": "write_file", "description": "Write.", "cache_control": {"type": "ephemeral"}, "input_schema": {
    "type": "object", "properties": {"path": {"type": "string"}, "count": {"type": "integer"}}}}  # fmt: skip
CALL = (
    "<tool_call>\n<function=write_file>\n<parameter=path>\n{}\n</parameter>\n"
    "<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>"
)
ASK: Any = [{"role": "user", "content": "Write a file."}]


@pytest.fixture(scope="module")
def serve() -> Iterator[tuple[Any, Script]]:
    with pytest.MonkeyPatch.context() as patch, scripted(patch) as serving:
        yield serving


def client(address: str, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, api_key=key, max_retries=0, timeout=120)


def test_tool_loop_whole_and_streamed(serve: Any):
    start, script = serve
    for stream in (False, True):
        script.play(
            QWEN3_5.tokenizer, "hm\n</think>\n\nI write.\n" + CALL.format("</tool_call>"), "</think>\n\nWritten."
        )
        with start(QWEN3_5.tokenizer) as address:
            api, messages = client(address), list(ASK)
            options: Any = {"model": "demo", "max_tokens": 500, "tools": [TOOL],
                            "thinking": {"type": "enabled", "budget_tokens": 400}}  # fmt: skip

            def answer(api: Any = api, options: Any = options, messages: Any = messages, stream: bool = stream) -> Any:
                if not stream:
                    return api.messages.create(messages=messages, **options)
                with api.messages.stream(messages=messages, **options) as events:
                    list(events)
                    return events.get_final_message()

            first = answer()
            assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
            thought, text, call = first.content
            assert (thought.thinking, bool(thought.signature), text.text) == ("hm", True, "I write.")
            assert (call.name, call.input) == ("write_file", {"path": "</tool_call>", "count": 3})
            assert first.stop_reason == "tool_use" and first.usage.input_tokens > 0 < first.usage.output_tokens
            messages += [
                {"role": "assistant", "content": [block.model_dump() for block in first.content]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "written"}]},
                    {"type": "text", "text": "Thanks.", "cache_control": {"type": "ephemeral"}}]},
            ]  # fmt: skip
            second = answer()
        assert [(block.type, block.text) for block in second.content] == [("text", "Written.")]
        assert second.stop_reason == "end_turn"
        assert second.usage.cache_read_input_tokens + second.usage.input_tokens > first.usage.input_tokens


def raw_events(address: str, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    text = post(address, "/v1/messages", {**body, "stream": True}).text
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_events_are_those_of_the_api(serve: Any):
    start, script = serve
    script.play(
        QWEN3_NEXT.tokenizer,
        '<think>\nhm\n</think>\n\nOk.\n<tool_call>\n{"name": "write_file", "arguments": {}}\n</tool_call>',
    )
    with start(QWEN3_NEXT.tokenizer) as address:
        events = raw_events(address, {"model": "demo", "max_tokens": 200, "messages": ASK, "tools": [TOOL]})
    names = [name for name, _ in events]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert all(value["type"] == name for name, value in events)
    opened = [value for name, value in events if name == "content_block_start"]
    closed = [value for name, value in events if name == "content_block_stop"]
    assert [value["content_block"]["type"] for value in opened] == ["thinking", "text", "tool_use"]
    assert [value["index"] for value in opened] == [value["index"] for value in closed] == [0, 1, 2]
    assert events[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_stop_sequences_and_limits(serve: Any):
    start, script = serve
    script.play(KIMI.tokenizer, "one two three", "one two three", "one two three")
    with start(KIMI.tokenizer) as address:
        options: Any = {"model": "demo", "messages": ASK}
        stopped = client(address).messages.create(max_tokens=50, stop_sequences=["thr", "x"], **options)
        assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == (
            "one two ",
            "stop_sequence",
            "thr",
        )
        cut = client(address).messages.create(max_tokens=3, **options)
        assert (cut.content[0].text, cut.stop_reason, cut.usage.output_tokens) == ("one", "max_tokens", 3)
        whole = client(address).messages.create(max_tokens=50, tool_choice={"type": "none"}, tools=[TOOL], **options)
        assert whole.content[0].text == "one two three"


CLAUDE_CODE: dict[str, Any] = {
    "model": "demo", "max_tokens": 32000, "stream": True, "temperature": 1,
    "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "s"})},
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.0; cch=abcde;"},
        {"type": "text", "text": "You are a coding agent.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
    "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "tools": [{**TOOL, "eager_input_streaming": True, "defer_loading": False}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "<system-reminder>\nx\n</system-reminder>"},
                                     {"type": "text", "text": "Read it.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "I read.", "signature": "abc"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Reading."},
            {"type": "tool_use", "id": "toolu_1", "name": "write_file", "input": {"path": "a"}},
            {"type": "tool_use", "id": "toolu_2", "name": "write_file", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "first", "is_error": False},
            {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "content": [
                {"type": "text", "text": "second"}, {"type": "text", "text": "third"}]},
            {"type": "text", "text": "Continue."}]},
    ],
}  # fmt: skip


def test_requests_like_claude_codes(serve: Any):
    start, script = serve
    script.play(QWEN3_5.tokenizer, "hm\n</think>\n\nDone.")
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    }
    with start(QWEN3_5.tokenizer) as address:
        answer = post(address, "/v1/messages?beta=true", CLAUDE_CODE, headers=headers)
        assert answer.status_code == 200 and "event: message_stop" in answer.text
        said = re.findall(r'"text_delta", "text": "(.*?)"', answer.text)
        assert "".join(said) == "Done."
        counted = post(address, "/v1/messages/count_tokens?beta=true", CLAUDE_CODE, headers=headers).json()
        assert list(counted) == ["input_tokens"] and counted["input_tokens"] > 50
        less = {**CLAUDE_CODE, "system": CLAUDE_CODE["system"][1:]}  # the billing block costs nothing
        assert client(address).messages.count_tokens(**{
            name: less[name] for name in ("model", "messages", "system", "tools", "thinking")
        }).input_tokens == counted["input_tokens"]  # fmt: skip


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
        {"messages": []}, {"messages": [1]}, {"messages": [{"role": "tool", "content": "x"}]}, {},
        {"messages": ASK, "system": 3}, {"messages": ASK, "system": [IMAGE]}, {"messages": ASK, "tools": {}},
        {"messages": ASK, "tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"messages": ASK, "tools": [{"name": "a b", "input_schema": {}}]}, {"messages": ASK, "thinking": {"type": "x"}},
        {"messages": ASK, "thinking": {"type": "enabled", "budget_tokens": -1}}, {"messages": ASK, "max_tokens": 0},
        {"messages": ASK, "tool_choice": {"type": []}}, {"messages": ASK, "tool_choice": "auto"},
        {"messages": ASK, "tool_choice": {"type": "tool", "name": "f"}}, {"messages": ASK, "stop_sequences": 3},
        {"messages": ASK, "output_config": {"format": {"type": "x"}}}, {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": 3}]}]}, [], "x",
    ],
)  # fmt: skip
def test_refusals_have_the_apis_shape(serve: Any, body: Any):
    start, _ = serve
    with start(KIMI.tokenizer) as address:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            refused = post(address, path, body)
            told = refused.json()
            assert (refused.status_code, told["type"], told["error"]["type"]) == (400, "error", "invalid_request_error")
            assert told["error"]["message"]
        with pytest.raises(anthropic.NotFoundError):
            client(address).messages.create(model="other", messages=ASK, max_tokens=5)


def test_keys_and_models(serve: Any):
    start, _ = serve
    with start(KIMI.tokenizer, api_key="secret") as address:
        api = client(address, "secret")
        assert [m.id for m in api.models.list()] == ["demo"] and api.models.retrieve("demo").display_name == "demo"
        assert api.models.retrieve("demo").created_at.year >= 2026
        bearer = anthropic.Anthropic(base_url=address, auth_token="secret", max_retries=0)
        assert bearer.messages.count_tokens(model="demo", messages=ASK).input_tokens > 0
        assert post(address, headers={"X-Api-Key": "secret"}).status_code == 401  # the other routes have Bearer
        with pytest.raises(anthropic.AuthenticationError) as refused:
            client(address, "other").messages.count_tokens(model="demo", messages=ASK)
        assert refused.value.body["error"]["type"] == "authentication_error"


def test_a_stream_is_never_silent(serve: Any, monkeypatch: pytest.MonkeyPatch):
    """Pings while a call is said."""
    start, script = serve
    monkeypatch.setattr(app, "KEEP_ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(script, "seconds", 0.15)
    script.play(QWEN3_NEXT.tokenizer, '<tool_call>\n{"name": "write_file", "arguments": {}}\n</tool_call>')
    with start(QWEN3_NEXT.tokenizer) as address:
        body = {"model": "demo", "max_tokens": 200, "messages": ASK, "tools": [TOOL]}
        names = [name for name, _ in raw_events(address, body)]
    assert names[0] == "message_start" and names[-1] == "message_stop"
    assert names.index("ping") < names.index("content_block_start") and names.count("ping") > 5

"""Answers with several families' markers as clients get them: whole, and in streams that are never silent for long."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from flash_moe_mlx.server import app

from ..support.chat_models import GLM, GPT_OSS, KIMI, QWEN3_5, QWEN3_NEXT, TOOL, make_tokenizer
from ..support.scripted import Script, scripted
from ..support.serving import CHAT

pytestmark = pytest.mark.xdist_group("clients")
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def serve() -> Iterator[tuple[Any, Script]]:
    with pytest.MonkeyPatch.context() as patch, scripted(patch) as serving:
        yield serving


def ask(address: str, messages: list = USER, **fields: Any) -> tuple[int, dict[str, Any]]:
    reply = httpx.post(address + CHAT, json={"messages": messages, **fields}, timeout=60)
    return reply.status_code, reply.json()


def message(reply: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    assert reply[0] == 200, reply
    return reply[1]["choices"][0]["message"]


def events(address: str, **fields: Any) -> list[str]:
    with httpx.stream("POST", address + CHAT, json={"messages": USER, "stream": True, **fields}, timeout=60) as reply:
        return [line for line in reply.iter_lines() if line]


def test_what_is_emitted_can_be_sent_back(serve):
    start, script = serve
    bodies = ['{"name": "write file!", "arguments": {}}', '{"name": "f/g", "arguments": {}}', '{"name": "", "arguments": {}}',
              '{"name": "write_file", "arguments": "a"}', '{"name": "write_file", "arguments": ["a"]}',
              '{"name": "write_file", "arguments": {"path": "a\\ud83d"}}', '{"name": "write_file", "arguments": null}',
              '{"name": "no_such_tool", "arguments": {"x": [1, null]}}']  # fmt: skip
    with start(QWEN3_NEXT.tokenizer) as address:
        for body in bodies:
            script.play(QWEN3_NEXT.tokenizer, f"<tool_call>\n{body}\n</tool_call>", "sorry")
            said = message(ask(address, tools=[TOOL]))
            results = [{"role": "tool", "tool_call_id": c["id"], "content": "no"} for c in said.get("tool_calls", [])]
            assert results or body in said["content"]
            assert message(ask(address, [*USER, said, *results], tools=[TOOL]))["content"] == "sorry"


def test_a_half_pair_does_not_end_a_stream(serve):
    start, script = serve
    said = '<tool_call>\n{"name": "write_file", "arguments": {"path": "a\\ud83d"}}\n</tool_call>'
    with start(QWEN3_NEXT.tokenizer) as address:
        script.play(QWEN3_NEXT.tokenizer, said)
        told = events(address, tools=[TOOL])
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in told if line.startswith("data: {")]
        pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert told[-1] == "data: [DONE]" and json.loads("".join(pieces)) == {"path": "a\ufffd"}
        script.play(QWEN3_NEXT.tokenizer, "ok")
        body = json.dumps({"messages": [{"role": "user", "content": "half \ud83d of it"}]}).encode()
        reply = httpx.post(address + CHAT, content=body, headers={"Content-Type": "application/json"}, timeout=60)
        assert reply.status_code == 200


def test_thinking_and_calls_have_their_own_fields(serve):
    start, script = serve
    with start(GPT_OSS.tokenizer) as address:
        script.play(GPT_OSS.tokenizer, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!",
                    "<|channel|>final<|message|>Fine.")  # fmt: skip
        first = message(ask(address))
        assert (first["content"], first["reasoning_content"]) == ("Hi!", "Hm.")
        assert message(ask(address, [*USER, first, *USER]))["content"] == "Fine."


def test_a_call_that_max_tokens_cuts_is_none(serve):
    start, script = serve
    text = "<tool_call>write_file\n<arg_key>path</arg_key>\n<arg_value>a.txt</arg_value>\n<arg_key>content</arg_key>\n"
    with start(GLM.tokenizer) as address:
        script.play(GLM.tokenizer, text + "<arg_value>half of the fi", end=False)
        status, body = ask(address, tools=[TOOL], max_tokens=40)
        choice = body["choices"][0]
        assert status == 200 and choice["finish_reason"] == "length" and not choice["message"].get("tool_calls")


def test_ids_are_the_models_own(serve):
    start, script = serve
    with start(KIMI.tokenizer) as address:
        script.play(KIMI.tokenizer, "<|tool_calls_section_begin|><|tool_call_begin|>functions.write_file:4"
                    '<|tool_call_argument_begin|>{"path": "a"}<|tool_call_end|><|tool_calls_section_end|>')  # fmt: skip
        assert message(ask(address, tools=[TOOL]))["tool_calls"][0]["id"] == "functions.write_file:4"


def test_a_required_call(serve):
    start, script = serve
    with start(QWEN3_5.tokenizer) as address:
        script.play(
            QWEN3_5.tokenizer, "\n<function=write_file>\n<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>"
        )
        (call,) = message(ask(address, tools=[TOOL], tool_choice="required"))["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"count": 3}
    with start(GPT_OSS.tokenizer) as address:
        script.play(GPT_OSS.tokenizer, 'write_file <|constrain|>json<|message|>{"count": 3}<|call|>')
        (call,) = message(ask(address, tools=[TOOL], tool_choice="required"))["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"count": 3}


def test_a_stream_is_never_silent_for_long(serve, monkeypatch: pytest.MonkeyPatch):
    start, script = serve
    monkeypatch.setattr(app, "KEEP_ALIVE_SECONDS", 0.2)
    with start(QWEN3_NEXT.tokenizer) as address:
        script.play(
            QWEN3_NEXT.tokenizer, '<tool_call>\n{"name": "write_file", "arguments": {"path": "xxxxx"}}\n</tool_call>'
        )
        script.seconds, began = 0.03, time.monotonic()
        try:
            told = events(address, tools=[TOOL])
        finally:
            script.seconds = 0.0
        alive = [line for line in told if line == ": keep-alive"]
        assert 2 <= len(alive) <= (time.monotonic() - began) / 0.2
        assert told[-1] == "data: [DONE]" and any("tool_calls" in line for line in told)


def test_what_a_template_raises_is_400(serve):
    start, _ = serve
    for template in ("{{ 1 + 'a' }}", "{{ raise_exception('In verse, please') }}", "{{ messages[9].a.b }}"):
        with start(make_tokenizer(template, ("<s>",), "</s>")) as address:
            status, body = ask(address)
            assert status == 400 and "chat template" in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_completions_go_on_from_the_prompt(serve, stream: bool):
    """The space that a continuation begins with, half letters, offsets."""
    start, script = serve
    said = " a small 🦊 é\n"
    with start(QWEN3_NEXT.tokenizer) as address:
        script.play(QWEN3_NEXT.tokenizer, said)
        body = {"prompt": "Once there was", "max_tokens": -1, "logprobs": 1, "stream": stream}
        reply = httpx.post(address + "/v1/completions", json=body, timeout=60)
        bodies = [reply.json()] if not stream else [
            json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]  # fmt: skip
        choices = [body["choices"][0] for body in bodies]
        assert "".join(choice["text"] for choice in choices) == said
        logprobs = [choice["logprobs"] for choice in choices]
        tokens = [token for p in logprobs for token in p["tokens"]]
        offsets = [offset for p in logprobs for offset in p["text_offset"]]
        assert "".join(tokens) == said and "\ufffd" not in reply.text
        assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]


def test_progress_of_a_prompt(serve):
    start, script = serve
    long = [{"role": "user", "content": "a" * 900}]
    for wanted in (True, False):
        script.play(QWEN3_NEXT.tokenizer, "ok")
        with start(QWEN3_NEXT.tokenizer) as address:
            told = events(address, messages=long, return_progress=wanted)
        chunks = [json.loads(line[6:]) for line in told if line.startswith("data: {")]
        progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
        assert bool(progress) is wanted
        assert all(0 <= p["cache"] <= p["processed"] <= p["total"] and p["time_ms"] >= 0 for p in progress)
        assert [p["processed"] for p in progress] == sorted(p["processed"] for p in progress)
        assert all((p["remaining_ms"] is None) == (p["processed"] == p["cache"]) for p in progress)
        assert not progress or progress[-1]["remaining_ms"] == 0

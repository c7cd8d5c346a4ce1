"""OpenAI's /v1/responses by its official client: items whole and streamed, function calls, stored conversations."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from flash_moe_mlx.server.response_store import ResponseStore

from ..support.chat_models import KIMI, QWEN3_5, QWEN3_NEXT
from ..support.scripted import Script, scripted
from ..support.serving import client, post

pytestmark = pytest.mark.xdist_group("clients")  # they share one model

PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}, "count": {"type": "integer"}}}
TOOL: Any = {
    "type": "function",
    "name": "write_file",
    "description": "Write.",
    "parameters": PARAMETERS,
    "strict": False,
}
CALL = '<tool_call>\n{"name": "write_file", "arguments": {"path": "</tool_call>", "count": 3}}\n</tool_call>'
EVENTS: Any = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def serve() -> Iterator[tuple[Any, Script]]:
    with pytest.MonkeyPatch.context() as patch, scripted(patch) as serving:
        yield serving


def streamed(address: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, each checked against the client's types."""
    events = []
    for block in post(address, "/v1/responses", {**body, "stream": True}).text.strip().split("\n\n"):
        if block.startswith(":"):  # a busy machine kept the client waiting
            continue
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}" and value["sequence_number"] == len(events)
        EVENTS.validate_python(value)
        events.append(value)
    return events


def test_tool_loop_by_previous_response(serve: Any):
    start, script = serve
    for stream in (False, True):
        script.play(QWEN3_NEXT.tokenizer, f"<think>\nhm\n</think>\n\nI write.\n{CALL}", "Written.")
        with start(QWEN3_NEXT.tokenizer) as address:
            api = client(address)

            def ask(api: Any = api, stream: bool = stream, **options: Any) -> Any:
                if not stream:
                    return api.responses.create(model="demo", tools=[TOOL], **options)
                with api.responses.stream(model="demo", tools=[TOOL], **options) as events:
                    list(events)
                    return events.get_final_response()

            first = ask(input="Write a file.", instructions="Be brief.")
            assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
            thought, said, call = first.output
            assert (thought.content[0].text, said.content[0].text) == ("hm", "I write.")
            assert (call.name, json.loads(call.arguments)) == ("write_file", {"path": "</tool_call>", "count": 3})
            assert first.status == "completed" and first.usage.total_tokens > first.usage.input_tokens > 0
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "written"}
            second = ask(input=[result], previous_response_id=first.id)
            assert second.output_text == "Written." and second.usage.input_tokens > first.usage.input_tokens
            with pytest.raises(openai.NotFoundError):
                api.responses.create(model="demo", input="x", previous_response_id="resp_none")


def test_events_are_those_of_the_api(serve: Any):
    start, script = serve
    script.play(QWEN3_NEXT.tokenizer, f"<think>\nhm\n</think>\n\nOk.\n{CALL}", "one two three")
    with start(QWEN3_NEXT.tokenizer) as address:
        events = streamed(address, {"model": "demo", "input": "Hi", "tools": [TOOL], "store": False})
        cut = streamed(address, {"model": "demo", "input": "Hi", "max_output_tokens": 5})
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    for name in ("response.output_item.added", "response.output_item.done"):
        assert [event["output_index"] for event in events if event["type"] == name] == [0, 1, 2]
    final = Response.model_validate(events[-1]["response"])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"] and len(final.output) == 3
    for name, text in (("reasoning_text", "hm"), ("output_text", "Ok.")):
        assert "".join(e["delta"] for e in events if e["type"] == f"response.{name}.delta") == text
    assert cut[-1]["type"] == "response.incomplete"
    assert cut[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


CODEX: dict[str, Any] = {
    "model": "demo", "instructions": "You are Codex.", "stream": True, "store": False, "tool_choice": "auto",
    "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
    "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "client_metadata": {"x": "y"},
    "text": {"verbosity": "medium"}, "service_tier": "auto",
    "tools": [
        {**TOOL, "name": "shell_command"}, TOOL, {"type": "web_search", "external_web_access": False},
        {"type": "custom", "name": "apply_patch", "description": "Edit.", "format": {
            "type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
        {"type": "namespace", "name": "mcp", "description": "d", "tools": [{**TOOL, "name": "mcp_read"}]},
    ],
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "I look."}], "content": None,
         "encrypted_content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]},
        {"type": "function_call", "name": "shell_command", "arguments": "{\"path\": \"ls\"}", "call_id": "c1"},
        {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin Patch", "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "a.txt"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "ok"}]},
        {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"role": "user", "content": "Continue."},
    ],
}  # fmt: skip


def test_requests_like_codexs(serve: Any):
    start, script = serve
    patch = (
        "hm\n</think>\n\n<tool_call>\n<function=apply_patch>\n<parameter=input>\n*** Begin Patch\n+a\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    script.play(QWEN3_5.tokenizer, patch)
    with start(QWEN3_5.tokenizer) as address:
        events = streamed(address, CODEX)
    thought, call = events[-1]["response"]["output"]
    assert thought["type"] == "reasoning"
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "apply_patch", "*** Begin Patch\n+a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", None), ("input", []), ("input", 3), ("input", [1]), ("input", [{"type": "x"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]),
        ("input", [{"type": "function_call", "name": "f"}]), ("input", [{"role": "root", "content": "x"}]),
        ("input", [{"type": "function_call_output", "output": "x"}]), ("tools", {}), ("tools", [1]),
        ("tools", [{"type": "function", "name": "a b"}]), ("tool_choice", "required"), ("instructions", 3),
        ("text", {"format": {"type": "x"}}), ("reasoning", {"effort": 3}), ("background", True), ("text", 3),
        ("previous_response_id", 3), ("max_output_tokens", "x"), ("conversation", "c"),
    ],
)  # fmt: skip
def test_refusals(serve: Any, field: str, value: Any):
    start, _ = serve
    with start(KIMI.tokenizer) as address:
        refused = post(address, "/v1/responses", {"model": "demo", "input": "x", field: value})
    assert refused.status_code in (400, 404) and refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stored_response_is_read_again_and_deleted(serve: Any, stream: bool):
    start, script = serve
    script.play(QWEN3_NEXT.tokenizer, f"<think>\nhm\n</think>\n\nI write.\n{CALL}", "Next.")
    with start(QWEN3_NEXT.tokenizer) as address:
        api = client(address)
        options: Any = {"model": "demo", "input": "Write.", "tools": [TOOL], "metadata": {"a": "b"}}
        if stream:
            with api.responses.stream(**options) as events:
                first = next(event for event in events if event.type == "response.completed").response
        else:
            first = api.responses.create(**options)
        kept = api.responses.retrieve(first.id)
        assert kept.model_dump(exclude={"output"}) == Response(**first.model_dump()).model_dump(exclude={"output"})
        assert [item.id for item in kept.output] == [item.id for item in first.output] and len(kept.output) == 3
        output = {"type": "function_call_output", "call_id": kept.output[-1].call_id, "output": "written"}
        second = api.responses.create(model="demo", input=[output], previous_response_id=first.id)
        assert api.responses.delete(first.id) is None
        for again in (api.responses.retrieve, api.responses.delete):
            with pytest.raises(openai.NotFoundError, match="still stored") as refused:
                again(first.id)
            assert refused.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError, match="previous_response_id"):
            api.responses.create(model="demo", input=[output], previous_response_id=first.id)
        assert api.responses.retrieve(second.id).output_text == "Next."
        with pytest.raises(openai.BadRequestError, match="stream"):
            list(api.responses.retrieve(second.id, stream=True))
        script.play(QWEN3_NEXT.tokenizer, "Not kept.")
        unstored = api.responses.create(model="demo", input="Hi", store=False)
        with pytest.raises(openai.NotFoundError):
            api.responses.retrieve(unstored.id)


def test_the_store_is_bounded():
    store = ResponseStore(max_bytes=1000, max_responses=3)
    messages, response = [{"role": "user", "content": "x" * 100}], {"id": "a"}
    for name in "abc":
        store.put(name, messages, response)
    assert store.get("a") == messages and store.response("a") == response
    store.put("d", messages, response)
    assert store.get("b") is None and store.get("a") == messages
    store.put("e", messages, {"text": "x" * 600})
    assert store.get("a") is not None and store.get("c") is None and store.nbytes <= 1000
    store.put("f", messages, {"text": "x" * 1001})
    assert store.get("f") is store.response("f") is None and store.nbytes <= 1000
    assert store.delete("a") and not store.delete("a") and store.delete("e") and store.nbytes == 0

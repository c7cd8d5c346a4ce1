"""Real clients, each through a tool loop of two turns, against models of several families that say what they are told.

openai is among the development dependencies; langchain-openai and litellm come with the extra "clients", the AI SDK
with npm ci --prefix tests/npm.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ..support.chat_models import DEEPSEEK, GPT_OSS, KIMI, MISTRAL, QWEN3_5, QWEN3_NEXT, TOOL, Family
from ..support.scripted import Script, scripted
from ..support.serving import client

pytestmark = pytest.mark.xdist_group("clients")  # they share one model

NPM = Path(__file__).parent.parent / "npm"
SYSTEM, QUESTION, AGAIN = "Be brief.", "Write a file.", "And another."


@pytest.fixture(scope="module")
def serve() -> Iterator[tuple[Any, Script]]:
    with pytest.MonkeyPatch.context() as patch, scripted(patch) as serving:
        yield serving


def xml(path: str) -> str:
    return (
        f"Let me write.\n<tool_call>\n<function=write_file>\n<parameter=path>\n{path}\n</parameter>\n"
        "<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>"
    )


def kimi(path: str) -> str:
    number = 0 if path == "a.txt" else 1
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.write_file:{number}<|tool_call_argument_begin|>"
        f'{{"path": "{path}", "count": 3}}<|tool_call_end|><|tool_calls_section_end|>'
    )


def channels(path: str) -> str:
    return (
        "<|channel|>analysis<|message|>Let me write.<|end|><|start|>assistant<|channel|>commentary "
        f'to=functions.write_file <|constrain|>json<|message|>{{"path": "{path}", "count": 3}}<|call|>'
    )


def tagged(path: str) -> str:
    call = json.dumps({"name": "write_file", "arguments": {"path": path, "count": 3}})
    return f"<think>\nLet me write.\n</think>\n\n<tool_call>\n{call}\n</tool_call>"


def listed(path: str) -> str:
    return f"[TOOL_CALLS]{json.dumps([{'name': 'write_file', 'arguments': {'path': path, 'count': 3}}])}"


def fenced(path: str) -> str:
    return (
        f'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write_file<｜tool▁sep｜>{{"path": "{path}", "count": 3}}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )


MODELS: list[tuple[Family, Callable[[str], str], Callable[[str], str]]] = [
    (QWEN3_5, xml, lambda text: f"</think>\n\n{text}"),
    (QWEN3_NEXT, tagged, str),
    (KIMI, kimi, str),
    (GPT_OSS, channels, lambda text: f"<|channel|>final<|message|>{text}"),
    (MISTRAL, listed, str),
    (DEEPSEEK, fenced, str),
]
models = pytest.mark.parametrize(("family", "call", "answer"), MODELS, ids=[family.name for family, *_ in MODELS])
few_models = pytest.mark.parametrize(("family", "call", "answer"), MODELS[:5:2], ids=lambda v: getattr(v, "name", None))
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
CALLED = [{"path": "a.txt", "count": 3}, {"path": "</tool_call>", "count": 3}]


@pytest.fixture
def address(serve: Any, family: Family, call: Any, answer: Any) -> Iterator[str]:
    """A server whose model calls, answers, calls again and answers again."""
    start, script = serve
    script.play(family.tokenizer, call("a.txt"), answer("Written."), call("</tool_call>"), answer("Again."))
    with start(family.tokenizer) as address:
        yield address


def run_openai(address: str, stream: bool) -> tuple[list[Any], list[str]]:
    api, called, texts = client(address), [], []
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    for question in (QUESTION, AGAIN):
        messages.append({"role": "user", "content": question})
        while True:
            options: dict[str, Any] = {"model": "demo", "messages": messages, "tools": [TOOL]}
            if stream:
                with api.chat.completions.stream(**options) as events:
                    choice = events.get_final_completion().choices[0]
            else:
                choice = api.chat.completions.create(**options).choices[0]
            messages.append(choice.message.model_dump(exclude_none=not stream))
            if choice.finish_reason != "tool_calls":
                break
            for made in choice.message.tool_calls:
                called.append(json.loads(made.function.arguments))
                messages.append({"role": "tool", "tool_call_id": made.id, "content": "written"})
        texts.append(choice.message.content)
    return called, texts


@models
@streamed
def test_openai(address: str, stream: bool):
    assert run_openai(address, stream) == (CALLED, ["Written.", "Again."])


@pytest.mark.parametrize(("family", "call", "answer"), MODELS[:1], ids=["qwen3.5"])
def test_openai_parse(address: str):
    """The client's own parser: arguments as a pydantic model, and parsed again in the second turn."""
    import pydantic

    class WriteFile(pydantic.BaseModel):
        path: str
        count: int | None = None

    tool = openai.pydantic_function_tool(WriteFile, name="write_file")
    tool["function"].pop("strict")
    choice = client(address).chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], tools=[tool]
    ).choices[0]  # fmt: skip
    (made,) = choice.message.tool_calls
    assert WriteFile.model_validate_json(made.function.arguments, strict=True) == WriteFile(path="a.txt", count=3)


@few_models
@streamed
def test_langchain(address: str, stream: bool):
    langchain = pytest.importorskip("langchain_openai", reason="needs the extra 'clients'")
    from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage

    api = langchain.ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="demo", max_retries=0)
    model = api.bind_tools([TOOL])
    messages: list[Any] = [SystemMessage(SYSTEM)]
    called, texts = [], []
    for question in (QUESTION, AGAIN):
        messages.append(HumanMessage(question))
        while True:
            if stream:
                said: Any = AIMessageChunk("")
                for chunk in model.stream(messages):
                    said = said + chunk
            else:
                said = model.invoke(messages)
            messages.append(said)
            if not said.tool_calls:
                break
            for made in said.tool_calls:
                called.append(made["args"])
                messages.append(ToolMessage("written", tool_call_id=made["id"]))
        texts.append(said.content)
    assert (called, texts) == (CALLED, ["Written.", "Again."])


@few_models
@streamed
def test_litellm(address: str, stream: bool):
    litellm = pytest.importorskip("litellm", reason="needs the extra 'clients'")
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    called, texts = [], []
    for question in (QUESTION, AGAIN):
        messages.append({"role": "user", "content": question})
        while True:
            answer = litellm.completion(
                model="openai/demo", api_base=f"{address}/v1", api_key="none", messages=messages, tools=[TOOL],
                stream=stream, max_retries=0,
            )  # fmt: skip
            if stream:
                answer = litellm.stream_chunk_builder(list(answer), messages=messages)
            message = answer.choices[0].message
            messages.append(message.model_dump())
            if not message.tool_calls:
                break
            for made in message.tool_calls:
                called.append(json.loads(made.function.arguments))
                messages.append({"role": "tool", "tool_call_id": made.id, "content": "written"})
        texts.append(message.content)
    assert (called, texts) == (CALLED, ["Written.", "Again."])


@few_models
@streamed
def test_ai_sdk(address: str, stream: bool):
    if shutil.which("node") is None or not (NPM / "node_modules" / "ai").exists():
        pytest.skip("needs node and the AI SDK: npm ci --prefix tests/npm")
    how = "stream" if stream else "whole"
    done = subprocess.run(
        ["node", NPM / "tool_loop.mjs", address, how], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["called"], told["texts"]) == (CALLED, ["Written.", "Again."])

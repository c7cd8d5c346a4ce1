"""The examples run as they stand, on the embedded model."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from flash_moe_mlx import load_tools

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.xdist_group("examples")  # they share one run of the demo


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo() -> str:
    return run("examples/demo.py")


def test_demo_streams_under_a_limit_that_holds_a_part_of_the_experts(demo: str):
    slots, experts = re.search(r"room for ([\d,]+) of ([\d,]+) experts", demo).groups()
    assert int(slots) < int(experts)
    assert 0 < float(re.search(r"hit rate +([\d.]+)%", demo)[1]) < 100
    assert float(re.search(r"read from disk +([\d.]+) [kM]B", demo)[1]) > 0
    peak, limit = re.search(r"peak memory +([\d.]+) MB, limit ([\d.]+) MB", demo).groups()
    assert float(peak) <= float(limit)


def test_demo_answers_sensibly(demo: str):
    assert "42" in demo
    call = re.search(r"<tool_call>(.*?)</tool_call>", demo, re.DOTALL)[1]
    assert json.loads(call) == {"name": "get_weather", "arguments": {"city": "Lisbon"}}
    assert re.search(r"fox(.*[.!]\n)", demo.split("> Tell me a story")[1].split("\n", 1)[1])


def test_quickstart():
    assert "42" in run("examples/quickstart.py")


def test_streaming():
    text = run("examples/streaming.py")
    assert "fox" in text
    assert 0 < int(re.search(r"(\d+)% of the experts were in memory", text)[1]) < 100


def test_custom_sampler():
    lines = run("examples/custom_sampler.py").splitlines()
    assert [line.split(":")[0] for line in lines] == ["greedy", "mlx-lm's sampler", "typical", "without forest"]
    stories = [line.partition(": ")[2] for line in lines]
    assert "forest" in stories[0] and "forest" not in stories[3]
    assert len(set(stories)) == 4 and all(story.startswith("Once") for story in stories)


def test_tool_calling():
    text = run("examples/tool_calling.py")
    assert 'calls calculate(expression="17 + 25")\ngets 42' in text
    assert 'calls get_weather(city="Lisbon")\ngets {"temperature": 16, "condition": "sunny"}' in text
    assert "16" in text.rpartition("gets ")[2].partition("}")[2]


@pytest.mark.parametrize(
    ("file", "name", "arguments", "result"),
    [
        ("read_file", "read_file", {"path": "LICENSE"}, "MIT License"),
        ("read_file", "read_file", {"path": "README.md", "first_line": 2}, "\nRun Mixture"),
        ("shell", "run_command", {"command": "echo a; exit 3"}, '{"exit_code": 3, "output": "a\\n", "errors": ""}'),
    ],
)
def test_tools_for_the_chat(file: str, name: str, arguments: dict, result: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    (tool,) = load_tools(ROOT / "examples" / "tools" / f"{file}.py")
    assert tool.name == name
    got = tool.run(arguments)
    assert got.ok and got.text.startswith(result)


def test_benchmark_runs():
    output = run("benchmarks/run.py", "--runs", "1", "--max-tokens", "4")
    rows = [line.split("\t") for line in output.splitlines() if line[0].isdigit()]
    assert [len(row) for row in rows] == [7, 7, 7]
    limits, read = [int(row[0]) for row in rows], [int(row[3]) for row in rows]
    assert limits == sorted(limits)
    assert read == sorted(read, reverse=True)


def test_embed_in_fastapi():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, ROOT / "examples" / "embed_in_fastapi.py", "--port", str(port)]
    with subprocess.Popen(command, env=environment) as process:
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    answer = httpx.get(f"{address}/ask", params={"question": "What is 17 + 25?"}, timeout=60)
                    break
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            assert answer.status_code == 200 and "42" in answer.text
            assert httpx.get(f"{address}/stats").json()["tokens"] > 20
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 0

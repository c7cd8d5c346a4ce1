"""The check of a Mac, in this process; the steps that take long are stood in for, or have tests of their own."""

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import pytest

from flash_moe_mlx import machine, system

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = argparse.Namespace(model=None, quick=False, full=False)
STEPS_RUN = ("system", "device", "demo", "model", "by-hand")
GB = 10**9


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mac_check", ROOT / "examples" / "mac_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mac_check", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def report(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[str, int]:
    """Run the script and return its report and exit code."""
    path = tmp_path / "report.md"
    monkeypatch.setattr(sys, "argv", ["mac_check.py", "--report", str(path), *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return path.read_text(), ended.value.code


def test_the_embedded_model_answers(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(system, "is_macos", lambda: False)  # its GPU is not this test's
    held = mx.zeros(5_000_000)  # more than the limit, and none of the model's
    mx.eval(held)
    text, code = report(script, monkeypatch, tmp_path, "--only", *reversed(STEPS_RUN))
    rows = re.findall(r"^(\d+) (\S+) \| (.+) \| [\d.]+$", text, re.MULTILINE)
    assert [row[:2] for row in rows] == list(zip("1 2 4 8 11".split(), STEPS_RUN, strict=True))
    assert [result for _, _, result in rows] == ["-", "-", "ok", "left out", "-"]
    assert "What is 17 + 25? 17 plus 25 is 42." in text and "default memory limit: " in text
    assert text.count("[ ]") == len(script.BY_HAND) and code == 0


def test_a_failing_step_is_reported_and_the_others_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    assert len(script.STEPS) == 11  # as docs/mac.md counts them

    def refuse(_: object) -> None:
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    for name in script.STEPS:
        monkeypatch.setitem(script.STEPS, name, lambda _: script.Outcome("got", "wanted", True))
    monkeypatch.setitem(script.STEPS, "kernels", refuse)
    monkeypatch.setitem(script.STEPS, "server", lambda _: script.Outcome("500", "an answer", False))
    text, code = report(script, monkeypatch, tmp_path)
    assert code == 1
    assert re.findall(r"^## \d+ (\S+): FAILED", text, re.MULTILINE) == ["kernels", "server"]
    assert "Unable to build metal library" in text and "expected: an answer" in text
    assert len(re.findall(r"^## \d+ \S+: ok", text, re.MULTILINE)) == 9


@pytest.mark.parametrize(
    ("processor", "version", "backend", "working_set", "is_fine"),
    [
        ("arm64", (15, 1), "metal", 38 * GB, (True, True)),
        ("x86_64", (15, 1), "cpu", None, (False, False)),
        ("arm64", (13, 6), "metal", 20 * GB, (False, False)),
    ],
)
def test_expectations_of_a_mac(
    script: ModuleType, processor: str, version: tuple[int, ...], backend: str, working_set: int | None,
    is_fine: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    monkeypatch.setattr(system, "is_macos", lambda: True)
    monkeypatch.setattr(system, "macos_version", lambda: version)
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr(machine, "physical_memory_bytes", lambda: 51 * GB)
    monkeypatch.setattr(script, "physical_memory_bytes", lambda: 51 * GB)
    monkeypatch.setattr(script, "backend", lambda: backend)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": working_set})
    assert (script.check_system(OPTIONS).ok, script.check_device(OPTIONS).ok) == is_fine


@pytest.mark.parametrize("answer", ["17 plus 25 is 42", "17 plus 25 is 43", "nothing"])
def test_a_server_must_answer_with_a_logprob_per_token(
    answer: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """With a server of a few lines, so that no model is loaded."""
    code = f"""
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"])
        assert json.loads(self.rfile.read(length))["logprobs"]
        choice = {{"message": {{"content": {answer!r}}}, "logprobs": {{"content": [1, 2, 3]}}}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"choices": [choice], "usage": {{"completion_tokens": 3}}}}).encode())
if {answer!r} == "nothing":
    sys.exit("the model is missing")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
    stand_in = tmp_path / "server.py"
    stand_in.write_text(code)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {stand_in} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(script.sys, "executable", str(python))
    monkeypatch.setattr(script, "installed", lambda package: "1")
    outcome = script.check_server(OPTIONS)
    assert outcome.ok == answer.endswith("42")
    assert outcome.got.startswith(answer) if answer != "nothing" else "the model is missing" in outcome.got


@pytest.mark.parametrize(
    ("total", "code", "ok"),
    [("9 passed, 1 skipped", 0, True), ("1 failed, 9 passed", 1, False), ("9 skipped", 0, None)],
)
def test_tests_that_were_all_skipped_show_nothing(
    script: ModuleType, total: str, code: int, ok: bool | None, monkeypatch: pytest.MonkeyPatch
):
    done = subprocess.CompletedProcess([], code, f"...\nFAILED tests/a.py::test\n{total} in 1.00s\n", "")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: done)
    outcome = script.check_io_tests(OPTIONS)
    assert (outcome.got, outcome.ok) == (f"FAILED tests/a.py::test\n{total} in 1.00s", ok)


def test_what_a_step_lacks_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else object())
    assert script.check_io_tests(OPTIONS).got.startswith("left out: needs hypothesis: ")
    monkeypatch.setattr(script, "installed", lambda package: None)
    assert script.check_server(OPTIONS).got.startswith("left out: needs starlette and uvicorn: ")

"""Runs the documentation's Python blocks and commands as printed, on the embedded model.

Everything runs in this process and in a folder that looks like the repository's root, with the embedded model where
pages say ``path/to/checkpoint`` or name a checkpoint. Of commands that name a repository on the hub, arguments and
options are checked.
"""

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import tomllib
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer import TyperException
from typer.main import get_command

import flash_moe_mlx
from flash_moe_mlx.cli.main import app

from .support.command_line import invoke
from .support.serving import demo, wait_until

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    \S.*\n)+", re.MULTILINE)
SIGNATURE = re.compile(r"\w+\([^()]*(?:\([^()]*\)[^()]*)*\) ->")

HUB = re.compile(r"(?:Qwen|mlx-community)/|qwen3|gpt-oss|glm-")  # repositories, and names of flash-moe models
SERVER = "http://127.0.0.1:8080"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    blocks = [code for language, code in FENCE.findall(page.read_text()) if language == "python"]
    return [code for code in blocks if not SIGNATURE.match(code)]


def command_lines(page: Path) -> list[str]:
    """Lines of shell blocks and of indented blocks, without their comments."""
    text = page.read_text()
    blocks = [code for language, code in FENCE.findall(text) if language in ("sh", "bash", "console")]
    blocks += [inspect.cleandoc(block) for block in INDENTED.findall(FENCE.sub("", text))]
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if COMMAND.match(line)]


COMMAND = re.compile(r"(?:\w+=\S+ )*(?:flash-moe|python\d?|make|pip|echo|printf|curl|uv|git|mlx\.\w+)\b")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the repository's sources, and what examples call path/to/checkpoint."""
    for name in ("src", "examples", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("path/to/checkpoint", "Qwen3.5-35B-A3B-4bit"):
        shutil.copytree(str(files("flash_moe_mlx") / "demo"), tmp_path / name)
    (tmp_path / "book.txt").write_text("Ana has a red kite. The kite is in the tree.\n")
    (tmp_path / "Qwen3.5-35B-A3B").symlink_to(ROOT / "examples" / "train_demo" / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def send(text: str) -> None:
    """In place of a web socket's."""


def names_that_readers_have() -> dict[str, Any]:
    """Provide the names that the pages take for granted: a loaded model, messages, an address."""
    model, tokenizer = flash_moe_mlx.load("path/to/checkpoint", memory_limit="2GB")
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    return {
        "model": model,
        "tokenizer": tokenizer,
        "messages": messages,
        "prompt": tokenizer.apply_chat_template(messages, add_generation_prompt=True),
        "tools": [WEATHER],
        "path": "path/to/checkpoint",
        "socket": type("Socket", (), {"send": staticmethod(send)}),
    }


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=relative)
def test_python_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """In order, as in a notebook: a block may use what earlier ones made."""
    (folder / "tools.py").write_text((ROOT / "examples" / "tools" / "weather.py").read_text())
    names = names_that_readers_have()
    if page.name == "api.md":  # its examples are those of docstrings
        names |= {name: getattr(flash_moe_mlx, name) for name in flash_moe_mlx.__all__}
        names |= {"Part": import_module("flash_moe_mlx.chat.answer").Part}
    blocks = python_blocks(page)
    level = logging.getLogger("flash_moe_mlx").level
    served = demo() if any(SERVER in code for code in blocks) else contextlib.nullcontext(SERVER)
    with served as address, contextlib.ExitStack() as stack:
        stack.callback(logging.getLogger("flash_moe_mlx").setLevel, level)
        for number, code in enumerate(blocks):
            compiled = compile(
                code.replace(SERVER, address),
                f"{page.name}, block {number + 1}",
                "exec",
                ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            )
            result = eval(compiled, names)
            if inspect.iscoroutine(result):
                asyncio.run(result)


def run_line(line: str) -> str | None:
    """Run a command line of ours as a shell would; returns what is wrong, or None."""
    *sources, words = _pipeline(shlex.split(line, comments=True))
    environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(environment) :]
    target = None
    if ">" in words:
        words, (target,) = words[: words.index(">")], words[words.index(">") + 1 :]
    stdin = "".join(" ".join(source[1:]) + "\n" for source in sources)
    if any(HUB.match(word) for word in words) or (words[1] == "launch" and "--print" not in words):
        return _parse(words[1:])  # the hub can't be reached, and agents aren't installed
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        if words[1] == "serve":
            return _serve(words[1:])
        result = invoke(*words[1:], stdin=stdin)
    if target is not None:
        Path(target).write_text(result.stdout)
    return None if result.exit_code == 0 else f"{line}\nends with {result.exit_code}: {result.output}"


def _parse(words: list[str]) -> str | None:
    group = get_command(app)
    try:
        group.commands[words[0]].make_context(words[0], words[1:], parent=group.make_context("flash-moe", []))
    except TyperException as error:
        return f"flash-moe {' '.join(words)}: {error.format_message()}"
    return None


def _pipeline(words: list[str]) -> list[list[str]]:
    if "|" not in words:
        return [words]
    place = words.index("|")
    return [words[:place], *_pipeline(words[place + 1 :])]


def _serve(words: list[str]) -> str | None:
    """Start a server on a free port, and end it with Ctrl-C as soon as it answers."""
    run = uvicorn.Server.run

    def run_until_started(server: uvicorn.Server, sockets: list[Any]) -> None:
        def interrupt() -> None:
            wait_until(lambda: server.started)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        run(server, sockets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", run_until_started)
        result = invoke(*words, "--port", "0")
    if "http://" in result.stdout and result.exit_code in (0, 130):
        return None
    return f"flash-moe {' '.join(words)} ends with {result.exit_code}: {result.output}"


def fault_of(line: str) -> str | None:
    """Return the fault of a printed command, or None. Commands that build or install are looked up, not run."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((f"{line}: there is no such target" for word in words[1:] if word not in targets), None)
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"\[([\w,]+)\]", line)
        wrong = {extra for names in asked for extra in names.split(",")} - set(extras)
        return f"{line}: there is no extra {wrong}" if wrong else None
    if words[0].startswith("python"):
        script = Path(*words[2].split(".")) if words[1] == "-m" else Path(words[1])
        found = any((ROOT / path).is_file() for path in (script, script.with_suffix(".py"), script / "__main__.py"))
        installed = words[1] == "-m" and importlib.util.find_spec(words[2].split(".")[0]) is not None
        return None if found or installed else f"{line}: there is no {script}"
    if words[0] == "mlx.launch":  # several processes: what they run is looked up
        started = words[words.index("--") + 1 :]
        program = 1 if started[0] == "flash-moe" else 3
        known = started[0] == "flash-moe" or started[:3] == ["python", "-m", "flash_moe_mlx"]
        return _parse(started[program:]) if known else f"{line}: what it starts, no test knows"
    if words[0] == "curl":
        with demo() as address:
            line = line.replace(SERVER, address)
            done = subprocess.run(["sh", "-c", f"{line} --fail-with-body"], capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else f"{line}: {done.stdout}{done.stderr}"
    if "flash-moe" in words:
        return run_line(line)
    return f"{line}: a command that no test knows"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if command_lines(p)], ids=relative)
def test_commands_run(page: Path, folder: Path):
    lines = list(dict.fromkeys(command_lines(page)))
    assert [fault for line in lines if (fault := fault_of(line))] == []


def test_the_check_finds_faults(folder: Path):
    lines = ("make nonsense", "pip install 'flash_moe_mlx[nonsense]'", "python no/script.py", "git nonsense",
             "flash-moe doctor --nonsense")  # fmt: skip
    assert all(fault_of(line) for line in lines)
    assert run_line('echo "What is 17 + 25?" | flash-moe generate > answer.txt') is None
    assert "42" in Path("answer.txt").read_text()

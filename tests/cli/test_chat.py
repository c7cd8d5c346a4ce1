"""``flash-moe chat``: through a pipe, in a terminal, and what it draws there."""

import io
import json
import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flash_moe_mlx.cli import chat as module
from flash_moe_mlx.cli.chat_model import ChatModel, _prefix_cache
from flash_moe_mlx.cli.chat_session import COMMANDS
from flash_moe_mlx.cli.chat_settings import Settings
from flash_moe_mlx.cli.markdown import Region, finished
from flash_moe_mlx.cli.options import open_model
from flash_moe_mlx.cli.printable import printable
from flash_moe_mlx.cli.terminal import AnswerView
from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.formats.config_files import SamplingDefaults
from flash_moe_mlx.planning.planner import Planner
from flash_moe_mlx.progress import Progress

from ..support.command_line import refusal, succeed

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(str(files("flash_moe_mlx") / "demo"))
TOOL_CALL = "Use the calculator for 12 * 12."


def chat(*lines: str, options: tuple[str, ...] = ()) -> str:
    """Return the output of a chat through a pipe."""
    return succeed("chat", "--max-context", "1024", *options, stdin="".join(f"{line}\n" for line in lines))


def test_messages_and_tools_through_a_pipe():
    text = chat("Hello", TOOL_CALL, "no", TOOL_CALL, "perhaps", "always", TOOL_CALL, "/tools")
    assert text.partition("calls")[0].strip()
    assert text.count('calls calculate(expression="12 * 12")') == 3
    assert text.count("gives 144") == 2
    assert text.count("fails: refused by the user") == 1
    assert "calculate (always run)" in text


def test_a_call_is_refused_where_nobody_answers():
    assert "fails: refused by the user" in chat(TOOL_CALL)


def test_slash_commands(tmp_path: Path):
    file = tmp_path / "chat.json"
    text = chat(
        "/help", "/system", "Hello", "/stats", "/nonsense", f"/save {file}", "/clear", "/stats", "/save", "/load",
        f"/load {file}", "/system Be brief.", f"/save {file}", f"/load {tmp_path}", "/quit", "Hello",
    )  # fmt: skip
    assert all(name in text for name in COMMANDS)
    assert text.endswith("Check the path.\n")  # nothing is answered after /quit
    assert "There is no system prompt." in text and "There is no such command." in text
    assert "hit rate" in text and "context 0 of 1,024 tokens" in text
    assert "2 messages are in" in text and "2 messages were in" in text
    assert text.count("must name a file") == 2 and "must be a saved conversation" in text
    saved = json.loads(file.read_text())
    assert saved["system"] == "Be brief."
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no JSON", '{"system": "", "messages": [{"role": "judge", "content": ""}]}']
)
def test_other_files_are_not_loaded(content: str, tmp_path: Path):
    (tmp_path / "file").write_text(content)
    assert "must be a saved conversation" in chat(f"/load {tmp_path / 'file'}")


def test_tools_of_a_file_and_none(tmp_path: Path):
    text = chat("/tools", options=("--tools", str(ROOT / "examples/tools/weather.py"), "--no-calculator"))
    assert "get_weather" in text and "calculate" not in text
    assert "There are none." in chat("/tools", options=("--no-calculator",))
    (tmp_path / "tools.py").write_text("x = 1\n")
    assert "must define functions" in refusal("chat", "--tools", str(tmp_path / "tools.py"), stdin="")


def test_an_error_ends_the_turn_and_not_the_chat():
    text = chat("word " * 2000, "Hello")
    assert text.rpartition("larger max_context.")[2].strip()


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another directory with the demo's files."""
    folder = tmp_path / "other"
    folder.mkdir()
    for file in DEMO.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    return folder


def test_another_model_continues_the_conversation(other: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[tuple[str, str | None, str | None]] = []

    @contextmanager
    def noted(name: str | None, *arguments: Any, adapter_path: str | None) -> Iterator[Any]:
        events.append(("open", name, arguments[5]))
        with open_model(name, *arguments, adapter_path=adapter_path) as loaded:
            yield loaded
        events.append(("close", name, arguments[5]))

    monkeypatch.setattr(module, "open_model", noted)
    text = chat("Hello", "/model", f"/model {other}", "/retry", "What is 17 + 25?", "yes", options=("--revision", "v1"))
    assert "the embedded demo: 128 of 128 experts in" in text and f"{other}: 128 of 128 experts" in text
    assert "nothing to answer" not in text and "gives 42" in text
    # Never two at once; the revision belongs to the model of the command line.
    name = str(other)
    assert events == [("open", None, "v1"), ("close", None, "v1"), ("open", name, None), ("close", name, None)]


def test_a_model_that_can_not_be_used_leaves_the_last_one(other: Path, tmp_path: Path):
    (other / "chat_template.jinja").unlink()
    bare = json.loads((other / "tokenizer_config.json").read_text())
    bare.pop("chat_template", None)
    (other / "tokenizer_config.json").unlink()
    (other / "tokenizer_config.json").write_text(json.dumps(bare))
    text = chat(
        "/model nope", "/model some/repository", f"/model {tmp_path}", f"/model {other}", "/model", TOOL_CALL, "yes"
    )
    for words in (
        "nope must be a directory or a hub repository",
        "Run: flash-moe pull some/repository",
        f"config.json] must be in {tmp_path}",
        "must have a chat template, got none",
        "the embedded demo: 128 of 128 experts in",
        "gives 144",
    ):
        assert words in text


def test_a_model_that_does_not_fit_is_refused_before_the_last_one_is_closed(monkeypatch: pytest.MonkeyPatch):
    def closed(*_: Any) -> None:
        raise AssertionError("the model was closed")

    monkeypatch.setattr(ChatModel, "_close", closed)
    limit = ("--memory-limit", "14MB", "--prefix-cache", "0", "--max-context", "128")
    monkeypatch.setattr(Planner, "open", partial(_with_limit, Planner.open, "2MB"))
    text = succeed("chat", *limit, stdin=f"/model {DEMO}\n/model\n")
    assert "must be at least" in text and "got 2.00 MB" in text
    assert "the embedded demo:" in text


def _with_limit(opened: Any, limit: str, *arguments: Any, **options: Any) -> Planner:
    return opened(*arguments, **{**options, "memory_limit": limit})


def test_a_prefix_cache_that_does_not_fit_is_refused():
    assert "must be at least" in refusal(
        "chat", "--memory-limit", "14MB", "--prefix-cache", "13MB", "--max-context", "128"
    )
    assert _prefix_cache(None, "0") is None


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one\ntwo", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n```\na\n\nb", "one\n\n"),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("~~~\n```\n\n~~~\n\nc", "~~~\n```\n\n~~~\n\n"),
        ("one\n ", ""),
        ("1. **Step**:\n\n    ```sh\n    a\n    ```\n\n   Then check.\n\n2. next", ""),  # one list
        ("- a\n\n- b\n\ntext", "- a\n\n- b\n\n"),
        ("````\n```\n\nb\n````\n\nc", "````\n```\n\nb\n````\n\n"),  # three don't close four
    ],
)
def test_finished_blocks(text: str, done: str):
    assert text[: finished(text)] == done


def test_a_narrower_terminal_keeps_no_old_lines():
    """It has wrapped the lines: as many rows are erased as they take now."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=20, legacy_windows=False)
    region = Region(console)
    region.draw("word " * 14)
    assert region._widths == [40, 30]
    before = out.tell()
    console.size = console.size.__class__(20, 20)
    region.draw("word " * 14)
    # Two lines of 40 and 30 cells have become four rows of 20.
    assert out.getvalue()[before:].count("\x1b[1A\x1b[2K") == 4
    assert "\x1b[J" not in out.getvalue()  # which would keep what is erased in tmux's history
    region.close()
    assert out.getvalue().endswith("\x1b[?25h")


def test_settings_change_by_name():
    settings = Settings(SamplingDefaults(0.6, 0.95, 20), 256)
    settings.change("temperature", "0.2")
    settings.change("--top-p", "1")
    settings.change("max_tokens", "99")
    assert str(settings) == "temperature 0.2, top-k 20; max-tokens 99"
    settings.change("max-tokens", "-1")
    assert settings.max_tokens == -1
    for name, value, words in (
        ("heat", "1", "no setting"),
        ("top-k", "many", "takes a number"),
        ("min-p", "3", "to 1"),
        ("max-tokens", "0", "or -1 for no limit"),
        ("top-k", "-1", "takes a number"),
    ):
        with pytest.raises(RequestError, match=words):
            settings.change(name, value)


def drawn(thinking: str, *pieces: tuple[str, str]) -> str:
    """Return the final screen: the lines that were not erased again."""
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=10, legacy_windows=False)
    with AnswerView(console, thinking) as view:
        view.step(Progress("reading the prompt", 1, 2, "tokens"))
        for kind, text in pieces:
            view.write(kind, text)
    return console.file.getvalue()


def test_markdown_is_rendered_and_thinking_dimmed():
    shown = drawn("show", ("thinking", "Hm.\n"), ("text", "**bo"), ("text", "ld**\n\nnext\x1b[2J"))
    assert "\x1b[2;3mHm." in shown and "\x1b[1mbold\x1b[0m" in shown and "next\N{REPLACEMENT CHARACTER}" in shown
    assert shown.index("Hm.") < shown.index("\x1b[1mbold") < shown.rindex("next")
    hidden = drawn("hide", ("thinking", "Hm.\n"), ("text", "x"))
    assert "Hm." not in hidden and "x" in hidden
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0  # the cursor is back


def test_control_characters_are_not_shown():
    assert printable("a\x1b[2J\r\x07\u202eb\tc\n") == "a�[2J���b\tc\n"


@pytest.fixture
def terminal(tmp_path: Path) -> Any:
    pexpect = pytest.importorskip("pexpect")
    pytest.importorskip("prompt_toolkit")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path),
        "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100", "LINES": "30",
    }  # fmt: skip
    child = pexpect.spawn(
        sys.executable, ["-m", "flash_moe_mlx", "chat", "--max-context", "1024"],
        env=environment, encoding="utf-8", dimensions=(30, 100), timeout=240,
    )  # fmt: skip
    yield child
    child.close(force=True)


READY = "\x1b[?2004h"  # prompt_toolkit waits for a message


def test_a_chat_in_a_terminal(terminal: Any, tmp_path: Path):
    """A call confirmed, one refused, an answer interrupted, a message of two lines, the terminal as it was."""
    before = termios.tcgetattr(terminal.child_fd)
    for part in ("128 of 128 experts", "1,024", "greedy", "calculate"):  # the first lines name them
        terminal.expect_exact(part)
    for message, answer, outcome in (("What is 17 + 25?", "yes", "gives 42"), (TOOL_CALL, "no", "fails: refused")):
        terminal.expect_exact(READY)
        terminal.send(f"{message}\r")
        terminal.expect_exact("Run calculate? yes, no, always: ")
        terminal.send(f"{answer}\r")
        terminal.expect_exact(outcome)
        terminal.expect("tok/s")
    terminal.expect_exact(READY)
    terminal.send("Tell me a story about a small fox.\r")
    terminal.expect("fox")  # as it was typed
    terminal.expect("Once|fox")
    terminal.send("\x03")
    terminal.expect_exact("interrupted")
    assert "^C" not in terminal.before  # it would be written into the answer
    terminal.expect_exact(READY)
    terminal.send("Hello\x1b\rmy friend\r")
    terminal.expect("tok/s")
    terminal.expect_exact(READY)
    terminal.send("\x03")
    terminal.expect("Ctrl-D leaves")
    terminal.expect_exact(READY)
    terminal.send("\x04")
    terminal.expect_exact("\x1b[?2004l")
    terminal.expect(sys.modules["pexpect"].EOF)
    after = termios.tcgetattr(terminal.child_fd)
    terminal.close()
    assert terminal.exitstatus == 0
    assert after == before
    history = next(tmp_path.rglob("chat_history")).read_text()
    assert "+Hello\n+my friend\n" in history and "yes" not in history

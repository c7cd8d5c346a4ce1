"""Behaviour common to all commands: help, errors, interrupts, closed pipes, completion, start-up."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from flash_moe_mlx import __version__
from flash_moe_mlx.cli import main, wording
from flash_moe_mlx.cli.wording import as_options

from ..support.command_line import invoke, refusal, succeed

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"mlx", "mlx_lm", "numba", "numpy", "transformers", "huggingface_hub", "rich", "prompt_toolkit", "starlette"}


def commands(group: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every command and subcommand by what is typed for it."""
    found = {}
    for name, command in group.commands.items():
        found[" ".join((*path, name))] = command
        found |= commands(command, (*path, name)) if hasattr(command, "commands") else {}
    return found


COMMANDS = commands(get_command(main.app))


def spawn(*arguments: str, **options: Any) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "flash_moe_mlx", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_help_lists_the_commands():
    for arguments in ((), ("--help",), ("-h",)):
        listed = re.findall(r"^  (\w+)  ", succeed(*arguments).split("Options:")[0], re.MULTILINE)
        assert listed == [name for name in COMMANDS if " " not in name]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_each_option_means_and_ends_with_examples(name: str):
    text = succeed(*name.split(), "--help")
    examples = text.partition("Examples:\n")[2].splitlines()
    assert examples and all(line.startswith("      ") for line in examples)
    assert any(f"flash-moe {name}" in line for line in examples)
    silent = [p.name for p in COMMANDS[name].params if not p.help and p.name != "help"]
    assert silent == []


def test_nothing_heavy_is_imported_before_a_command_runs():
    code = f"import sys; import flash_moe_mlx.cli.main; print(*({HEAVY} & {{m.split('.')[0] for m in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_version():
    assert succeed("--version") == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), r"No such command 'nonsense'\. See flash-moe --help\."),
        (("generate", "--qqq", "x"), r"No such option: --qqq\. See flash-moe generate --help\."),
        (
            ("generate", "--max-tokens", "many", "x"),
            r"'--max-tokens' / '-n': must be of type integer, got 'many'\. See flash-moe generate --help",
        ),
        (("generate", "--max-tokens", "0", "x"), r"\[--max-tokens\] must be at least 1, or -1"),
        (("generate", "--max-tokens", "-5", "x"), r"\[--max-tokens\] must be at least 1, or -1"),
        (("generate", "x", "--system"), r"--system.*See flash-moe generate --help"),
        (("generate", "x", "-p", "y"), r"\[prompt\] must be given once"),
        (("generate", " "), r"\[prompt\] must have text"),
        (("generate", "--io", "tape", "x"), r"'--io': 'tape' is not one of .*'direct'"),
        (("genrate", "x"), r"Did you mean 'generate'\? See flash-moe --help"),
        (("generate", "--memory-limit", "much", "x"), r"\[--memory-limit\] must be"),
        (("generate", "--memory-limit", "1kB", "x"), r"--memory-limit \d"),
        (("plan", "--disk-rate", "fast"), r"\[--disk-rate\] must be bytes or a text with a unit, got 'fast'"),
        (("generate", "--top-p", "2", "x"), r"'--top-p': must be at most 1, got '2'\. See"),
        (("simulate", "no/such"), r"\[trace\] no/such must be a routing trace.*got no such file\. .*flash-moe trace"),
        (("generate", "--model", "no/such/place", "x"), r"\[load\] no/such/place must be"),
        (
            ("generate", "word " * 300, "--max-context", "128"),
            r"at most --max-context 128 tokens.*larger --max-context\.",
        ),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], words: str):
    assert re.search(words, refusal(*arguments))


def command_that(error: BaseException | type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command ``fail`` that raises."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(main.app, "registered_commands", list(main.app.registered_commands))
    main.app.command()(fail)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), 2, "[/x/y] Permission denied. Check the path."),
        (OSError("no number"), 2, "[system] no number. See -vv for where it was raised."),
        (KeyboardInterrupt(), 130, ""),
        (EOFError(), 130, ""),
        (typer.Exit(7), 7, ""),
    ],
)
def test_how_commands_end(error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch):
    command_that(error, monkeypatch)
    result = invoke("fail")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.strip() == (f"flash-moe: {words}" if words else "")


def test_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch):
    command_that(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        invoke("fail")


def test_ctrl_c_in_the_middle_of_an_answer_ends_cleanly():
    with spawn("generate", "Tell me a story about a small fox.", "--max-tokens", "2000") as process:
        assert process.stdout.read(8)  # the story has begun
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


def test_a_closed_pipe_ends_quietly():
    with spawn("generate", "--help") as process:
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(60)
    assert (process.returncode, errors) == (141, b"")


def test_verbose_shows_where_an_error_was_raised():
    with spawn("-vv", "bench", "--cold", "--model", "no/such/place") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    lines = errors.decode().splitlines()
    assert any(line.startswith("Traceback") for line in lines) and lines[-1].startswith("flash-moe: [--cold]")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "_FLASH_MOE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "flash-moe gen",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "flash-moe gen",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-m", "flash_moe_mlx"], env=environment, capture_output=True, text=True, check=False
    )
    assert "generate" in done.stdout and "doctor" not in done.stdout


@pytest.mark.serial
def test_help_is_quick():
    def seconds() -> float:
        started = time.perf_counter()
        with spawn("--help") as process:
            process.communicate()
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 1.0


def test_commands_that_share_an_option_share_its_default():
    group = get_command(main.app)
    defaults: dict[str, set[object]] = {}
    for command in ("generate", "chat", "serve"):
        for parameter in group.commands[command].params:
            if parameter.name in ("temperature", "top_p", "top_k", "min_p", "seed", "max_context", "io", "verify"):
                defaults.setdefault(parameter.name, set()).add(parameter.default)
    assert len(defaults) == 8 and all(len(values) == 1 for values in defaults.values()), defaults


def test_verbose_is_taken_after_the_command_too():
    assert main.verbose_first(["generate", "-v", "x", "--verbose"]) == ["-v", "--verbose", "generate", "x"]
    assert main.verbose_first(["generate", "--", "-v"]) == ["generate", "--", "-v"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            '[memory] Use memory_limit="68.27MB" or max_context=128.',
            "[memory] Use --memory-limit 68.27MB or --max-context 128.",
        ),
        ("[max_context] Pass trust_remote_code=True.", "[--max-context] Pass --trust-remote-code."),
        ("Shorten it, or load with a larger max_context.", "Shorten it, or load with a larger --max-context."),
        ("[max_bytes] must be positive", "[--prefix-cache] must be positive"),
        ("Record one with model.streaming.trace.", "Record one with flash-moe trace."),
        ("/data/memory_limit/max_tokens.json and 'api_key'", "/data/memory_limit/max_tokens.json and 'api_key'"),
    ],
)
def test_errors_speak_of_options(message: str, words: str):
    assert as_options(message) == words


def test_what_errors_call_options_are_options():
    options = {option for command in COMMANDS.values() for parameter in command.params for option in parameter.opts}
    named = {re.match(r"--\S+", as_options(name))[0] for name in wording._NAMES}
    assert named <= options


def test_options_have_mlx_lms_names_too():
    group = get_command(main.app)
    names = {option for parameter in group.commands["generate"].params for option in parameter.opts}
    assert {"--temp", "-n", "--system-prompt", "--ignore-chat-template"} <= names

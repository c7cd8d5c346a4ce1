"""Terminals and logs receive no control characters from models, files or clients."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flash_moe_mlx.cli import printable as module
from flash_moe_mlx.cli.logs import (
    BURST,
    MAX_CHARACTERS,
    PERIOD_SECONDS,
    OwnLineHandler,
    PrintableFormatter,
    RepeatFilter,
)
from flash_moe_mlx.cli.printable import escaped, printable
from flash_moe_mlx.packing import verification
from flash_moe_mlx.progress import Progress, watching

from ..support.command_line import invoke, refusal

HIDDEN = {
    "ESC": "\x1b[2J", "a title": "\x1b]0;x\x07", "8-bit CSI": "\x9b2J", "return": "\r", "backspace": "\b", "NUL": "\0",
    "delete": "\x7f", "next line": "\x85", "right to left": "\u202e", "isolate": "\u2066", "mark": "\u200f",
    "line separator": "\u2028", "tag": "\U000e0041", "zero width": "\u200b",
    "half a pair": "\ud800", "noncharacter": "\uffff",
}  # fmt: skip


@pytest.mark.parametrize("text", HIDDEN.values(), ids=HIDDEN)
def test_nothing_that_a_terminal_obeys_is_left(text: str):
    shown = printable(f"a{text}b")
    assert shown.startswith("a\N{REPLACEMENT CHARACTER}") and shown.endswith("b") and shown.encode()
    for command in text:
        assert command.isprintable() or command not in shown
    document = escaped(json.dumps({text: [text]}, ensure_ascii=False))
    assert json.loads(document) == {text: [text]}
    assert printable(document) == document and document.encode()


@pytest.mark.parametrize(
    "text", ["plain\n\ttext", "é\u00a0中\u3000文", "می\u200cخواهم", "👩\u200d👩\u200d👧\ufe0f"], ids=repr
)
def test_text_of_every_language_is_left_alone(text: str):
    assert printable(text) == escaped(text) == text


def line(message: str, level: int = logging.ERROR, number: int = 1, *args: Any) -> logging.LogRecord:
    return logging.LogRecord("name", level, "file.py", number, message, args, None)


def test_log_lines_are_clean_and_short():
    formatter = PrintableFormatter("%(name)s: %(message)s")
    assert formatter.format(line("from %s", 40, 1, "\x1b[31m\udcff")) == "name: from \ufffd[31m\ufffd"
    assert len(formatter.format(line("x" * 10_000_000))) < 2 * MAX_CHARACTERS


def test_repeated_lines_are_counted_instead():
    now = [0.0]
    repeats = RepeatFilter(lambda: now[0])
    shown = [record for i in range(10_000) if repeats.filter(record := line(f"bad request {i}"))]
    assert len(shown) == BURST
    assert repeats.filter(line("elsewhere", number=2))
    assert all(repeats.filter(line("asked for", logging.INFO)) for _ in range(100))
    now[0] = PERIOD_SECONDS
    last = line("bad request %s", 40, 1, "%s")
    assert (
        repeats.filter(last) and last.getMessage() == f"bad request %s ({10_000 - BURST} more of these were left out)"
    )
    assert len(repeats._seen) == 2


def test_names_out_of_files_and_arguments_are_cleaned(tmp_path: Path):
    bad = tmp_path / "a\x1b[2J\u202e"
    bad.mkdir()
    (bad / "config.json").write_text("{")
    told = invoke("verify", str(bad)).output
    assert "\ufffd[2J" in told and "\x1b" not in told and "\u202e" not in told
    assert "\x1b" not in refusal("plan", str(tmp_path / "\x1b]0;x\x07"))
    assert "\x1b" not in invoke("generate", "--no-such\x1b[2J").stderr


HALF = "\udcff"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", HALF), ("generate", "--raw", HALF), ("generate", "--system", HALF, "Hi"),
        ("chat", "--system", HALF),
        ("trace", HALF, "--output", "x.npz"), ("serve", "--port", "0", "--name", HALF),
        ("serve", "--port", "0", "--api-key", HALF), ("serve", "--port", "0", "--allow-host", "a b"),
        ("serve", "--port", "0", "--host", "a" * 300),
    ],
    ids=lambda arguments: " ".join(arguments[:-1]),
)  # fmt: skip
def test_arguments_that_are_no_text_are_refused(arguments: tuple[str, ...]):
    assert "must be" in refusal(*arguments)


def test_standard_input_that_is_no_text_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "flash_moe_mlx", "generate"],
        input=b"Hi \xff",
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(
        b"flash-moe: [prompt] must be Unicode text, got half of a surrogate pair at character 3"
    )


def test_a_terminal_that_lacks_a_letter_is_no_error(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(module.sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    module.make_streams_total()
    print("é✓\ud800", flush=True)
    assert raw.getvalue() == b"???\n"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (FileNotFoundError(2, "No such file or directory", "x"), "[x] No such file or directory. Check the path."),
        (OSError(28, "No space left on device"), "[system] No space left on device. Free some space on the disk."),
        (OSError(24, "Too many open files"), "[system] Too many open files. Raise the limit on open files: ulimit -n."),
        (OSError("odd"), "[system] odd. See -vv for where it was raised."),
        (FileNotFoundError(2, "No such file", b"a\xff"), "[a\ufffd] No such file. Check the path."),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_advice_suits_the_error(monkeypatch: pytest.MonkeyPatch, error: OSError, advice: str):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(verification, "verify", fail)
    assert refusal("verify", ".") == f"flash-moe: {advice}"


def test_a_record_takes_the_status_line_away():
    stream = io.StringIO()
    seen: list[tuple[str, str]] = []  # (step, what was written before)
    with watching(lambda moment: seen.append((moment.step, stream.getvalue()))):
        OwnLineHandler(stream).emit(logging.makeLogRecord({"msg": "dense weights 1.81 MB"}))
    assert seen == [(Progress("").step, "")] and stream.getvalue() == "dense weights 1.81 MB\n"

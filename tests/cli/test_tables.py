"""Tables and paragraphs on a terminal and in a pipe."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from flash_moe_mlx.cli import tables

HEAD = ["name", "size"]
ROWS = [["one", "1.00 GB"], ["[bold]two\x1b[2J", "12.00 GB"]]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make standard output a terminal of 30 columns."""
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(tables, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))


def test_a_pipe_gets_one_plain_line_per_row(capsys: pytest.CaptureFixture[str]):
    tables.print_table(HEAD, [*ROWS, ["x" * 300, "0 B"]], right=["size"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["name", "size"], ["one", "1.00", "GB"]]
    assert lines[2].startswith("[bold]two\N{REPLACEMENT CHARACTER}[2J ")
    assert len(lines) == 4 and lines[3].split() == ["x" * 300, "0", "B"]
    assert len({len(line) for line in lines}) == 1, "the last column is aligned to the right"


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_a_rule_and_styles():
    text = console_text(lambda: tables.print_table(HEAD, ROWS))
    assert "\x1b[1mname" in text and "\u2500\u2500\u2500" in text and "\x1b[2J" not in text


@pytest.mark.usefixtures("terminal")
def test_values_and_paragraphs_wrap_between_words():
    sentence = "One two three four five six seven eight nine ten."
    text = console_text(lambda: tables.print_rows([("name", sentence)]))
    assert all(len(line) <= 30 for line in plain(text)) and all(line.startswith("      ") for line in plain(text)[1:])
    assert " ".join(" ".join(plain(text)).split()) == f"name {sentence}"
    text = console_text(lambda: tables.print_paragraphs([sentence, "Last."]))
    assert " ".join(text.split()) == f"{sentence} Last." and all(len(line) <= 30 for line in text.splitlines())


def console_text(show: Callable[[], None]) -> str:
    """Text that is printed for a terminal, with its escape codes, which typer would remove for a captured stream."""
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables.typer, "echo", shown.append)
        show()
    return "\n".join(shown)


def plain(text: str) -> list[str]:
    """Lines without styles."""
    return text.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()

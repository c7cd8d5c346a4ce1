"""The layout of the help: panels, lines that fit, the same content on a terminal and in a pipe."""

import re
from types import SimpleNamespace

import pytest
from typer.main import get_command

from flash_moe_mlx.cli import help as layout
from flash_moe_mlx.cli import main

from ..support.command_line import succeed

COMMANDS = list(get_command(main.app).commands)
WIDTH = 80


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(layout, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))


def before_examples(text: str) -> list[str]:
    return text.partition("Examples:")[0].splitlines()


def words(text: str) -> list[str]:
    """All words of a help, without what only one of its two forms has."""
    return re.sub(r"[^\w]+", " ", text).split()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_lines_fit_in_80_columns(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert [line for line in before_examples(succeed(*name.split(), "--help")) if len(line) > WIDTH] == []


def test_each_command_has_a_line_with_its_whole_summary(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    listed = dict(re.findall(r"^  (\w+) +(.*)$", succeed("--help").partition("Options:")[0], re.MULTILINE))
    assert [name for name in COMMANDS if not listed[name].endswith(".") or "..." in listed[name]] == []


def test_options_are_in_panels_by_subject():
    sections = re.findall(r"^(\w.*):$\n((?:  .*\n)+)", succeed("serve", "--help"), re.MULTILINE)
    assert [title for title, _ in sections] == ["Options", "Model", "Access", "Caches", "Sampling", "Memory and speed"]
    assert "--allow-host <str>" in dict(sections)["Access"]
    assert "--top-p" in dict(sections)["Sampling"] and "--io" in dict(sections)["Memory and speed"]


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_boxes_of_its_width():
    lines = before_examples(get_command(main.app).commands["serve"].get_help(context("serve")))
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    assert plain != lines  # there are styles
    assert [line for line in plain if len(line) > WIDTH] == []
    boxes = [line for line in plain if line.startswith(("\u256d", "\u2502", "\u2570"))]
    assert {len(line) for line in boxes} == {WIDTH} and any("Sampling" in line for line in boxes)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_terminal_is_told_what_a_pipe_is(name: str, request: pytest.FixtureRequest):
    piped = words(succeed(name, "--help"))
    request.getfixturevalue("terminal")
    assert sorted(words(re.sub(r"\x1b\[[\d;]*m", "", context(name).get_help()))) == sorted(piped)


def context(name: str) -> object:
    group = get_command(main.app)
    return group.commands[name].make_context(
        name, [], parent=group.make_context("flash-moe", [name]), resilient_parsing=True
    )

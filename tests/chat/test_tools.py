"""Tools: how they are described, called, and kept within bounds; and the calculator."""

import os
import time
from pathlib import Path

import pytest

from flash_moe_mlx.chat.calculator import calculate
from flash_moe_mlx.chat.tools import CALCULATOR, Tool, load_tools
from flash_moe_mlx.errors import RequestError

TOOLS = '''
import os, subprocess, sys, time
from pathlib import Path
from os.path import join  # not a tool: defined elsewhere

HELD = []

def weather(city: str, days: int = 1) -> dict:
    """Get the weather.

    Args:
        city: Which city.
        days: How many days.
    """
    HELD.append(city)
    return {"city": city, "days": days, "asked": len(HELD)}

def say(text: str, times: int):
    """Repeat a text.

    Args:
        text: What.
        times: How often.
    """
    print("this goes nowhere")
    return text * times

def sleep(file: str):
    """Start a sleeping child, write its number to a file, and wait.

    Args:
        file: Where.
    """
    child = subprocess.Popen(["sleep", "60"])
    Path(file).write_text(str(child.pid))
    time.sleep(60)

def leave():
    """Leave."""
    os._exit(3)

def fail():
    """Fail."""
    raise LookupError("no such thing")

def _hidden(): pass
'''


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tool]:
    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS)
    return {tool.name: tool for tool in load_tools(path)}


def test_functions_of_a_file_are_described(tools: dict[str, Tool]):
    assert list(tools) == ["weather", "say", "sleep", "leave", "fail"]
    assert tools["weather"].schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Get the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Which city."},
                    "days": {"type": "integer", "description": "How many days."},
                },
                "required": ["city"],
            },
        },
    }


def test_results(tools: dict[str, Tool]):
    for _ in range(2):  # each call has a process of its own
        result = tools["weather"].run({"city": "Zürich"})
        assert result.ok and result.text == '{"city": "Zürich", "days": 1, "asked": 1}'
    assert tools["say"].run({"text": "ab", "times": 2}).text == "abab"


def test_output_is_capped(tools: dict[str, Tool]):
    result = tools["say"].run({"text": "ab", "times": 500_000}, max_characters=10)
    assert result.ok and result.text == "ababababab\n[cut here: 1000000 characters]"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("fail", {}, "LookupError: no such thing"),
        ("leave", {}, "ended without a result, exit code 3"),
        ("weather", {"town": "x"}, "TypeError: weather() got an unexpected keyword argument 'town'"),
        ("weather", {}, "missing 1 required positional argument: 'city'"),
    ],
)
def test_failures_are_results(tools: dict[str, Tool], name: str, arguments: dict, words: str):
    result = tools[name].run(arguments)
    assert not result.ok and words in result.text


def test_time_is_limited_for_children_too(tools: dict[str, Tool], tmp_path: Path):
    file = tmp_path / "pid"
    started = time.monotonic()
    result = tools["sleep"].run({"file": str(file)}, timeout_seconds=1.5)
    assert time.monotonic() - started < 30  # it would be a minute
    assert not result.ok and result.text == "no result within 1.5 seconds"
    child = int(file.read_text())
    for _ in range(100):  # killed, and then collected by init
        if not Path(f"/proc/{child}").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, 9)
    pytest.fail("the tool's child outlived it")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(x): 'Doc.'", "f must have type hints"),
        ("def f(x: int): pass", "f must have type hints and a docstring"),
        ("def f(x: int):\n  'Says nothing of x.'", "f must have type hints and a docstring"),
        ("async def f(): 'Doc.'", "must be a plain function"),
        ("x = 1", "must define functions"),
        ("def f(:", "SyntaxError"),
        ("import no_such_module_here", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("raise MemoryError", "MemoryError"),
        ("class Odd(Exception): pass\nraise Odd('x')", "Odd: x"),
        ("def f(x: 'NoSuchType'):\n  'Doc.\\n\\n  Args:\\n    x: A thing.'", "f must have type hints"),
        ("\0", "SyntaxError|ValueError"),
    ],
)
def test_files_that_are_no_tools(tmp_path: Path, source: str, words: str):
    path = tmp_path / "tools.py"
    path.write_text(source)
    with pytest.raises(RequestError, match=words):
        load_tools(path)


def test_a_file_must_be_there(tmp_path: Path):
    for name in ("none.py", "text.txt", "."):
        with pytest.raises(RequestError, match="must be a Python file"):
            load_tools(tmp_path / name)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 + 25", 42),
        ("2 ^ 10 - 2**3", 1016),
        ("-(3 - 5) * 2.5", 5.0),
        ("0.1 + 0.2", 0.3),
        ("7 // 2 + 7 % 4", 6),
        ("sqrt(2) * sqrt(2)", 2.0),
        ("max(1, round(2.6)) × 3 ÷ 2", 4.5),
        ("2 ** 0.5", 1.41421356237),
        (" 10**20 ", 10**20),
        ("cos(pi)", -1.0),
    ],
)
def test_calculator(expression: str, value: float):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')", "(1).real", "open('x')", "x", "'a' * 3", "True + 1", "[1]", "1 if 1 else 2", "1 < 2",
        "9 ** 99999", "9 ** 9 ** 9", "(-8) ** 0.5", "1 / 0", "(", "", "lambda: 1", "round(2.5, ndigits=1)",
        "1 + " * 500, "f'{1}'", "1j", "10 ** 400 * 1.0", "factorial(9)",
    ],
)  # fmt: skip
def test_calculator_refuses(expression: str):
    with pytest.raises((ValueError, SyntaxError, ArithmeticError)):
        calculate(expression)


def test_calculator_is_a_tool():
    (tool,) = load_tools(CALCULATOR)
    assert tool.name == "calculate"
    assert tool.run({"expression": "6 * 7"}).text == "42"

"""Tools for models to call: a Python file's functions, described by their signatures and docstrings.

Each call runs in a process of its own, so that it can be ended at any time and can't damage this process. That
bounds its time and output. It is no sandbox: a tool may do whatever the user may.
"""

import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from ..errors import RequestError
from ..formats.foreign import ForeignCode, say
from ..system import kill_group

CALCULATOR = Path(__file__).with_name("calculator.py")
"""The built-in tool's file, for :func:`load_tools`."""

_MODULE = "flash_moe_mlx_tools"
_PROCESS = Path(__file__).with_name("tool_process.py")


@dataclass(frozen=True)
class ToolResult:
    """Result of a tool call.

    Attributes:
        text: The result, or a description of the failure.
        ok: Whether the call succeeded.
    """

    text: str
    ok: bool = True


@dataclass(frozen=True)
class Tool:
    """A function of a file.

    Attributes:
        name: The function's name.
        schema: Its description in the form that chat templates take: ``{"type": "function", "function": {...}}``.
        path: The file.
    """

    name: str
    schema: dict[str, Any]
    path: Path

    def run(
        self, arguments: Mapping[str, Any], *, timeout_seconds: float = 30.0, max_characters: int = 8000
    ) -> ToolResult:
        """Call the tool in a process of its own. Exceptions and timeouts are results that are not ok."""
        request = {"path": str(self.path), "name": self.name, "arguments": arguments, "max_characters": max_characters}
        # -P: the package's folder must not come first in the child's sys.path.
        command = [sys.executable, "-P", str(_PROCESS)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(json.dumps(request, default=str).encode(), timeout_seconds)
            except subprocess.TimeoutExpired:
                return ToolResult(f"no result within {timeout_seconds:g} seconds", ok=False)
            finally:  # whatever it started goes with it, after Ctrl-C too
                kill_group(process.pid)
        if not output:
            return ToolResult(f"the tool ended without a result, exit code {process.returncode}", ok=False)
        reply = json.loads(output)
        return ToolResult(reply["text"].encode(errors="replace").decode(), reply["ok"])


def load_tools(path: str | Path) -> list[Tool]:
    """Load the tools of a Python file: each public function that it defines, in order.

    The file is imported here for its signatures, and again in each call's process.

    Args:
        path: The file. Each function needs type hints, and a docstring in Google's style that describes it and its
            arguments.

    Raises:
        RequestError: If the file can't be imported, has no functions, or one that can't be described.
    """
    if "\0" in str(path):
        raise RequestError("[tools] a Python file's path must hold no NUL character, got one. Check the path.")
    path = Path(path).resolve()
    module = _import(path)
    functions = [
        function
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not functions:
        raise RequestError(f"[{path.name}] must define functions, got none. Write one with type hints and a docstring.")
    return [_tool(function, path) for function in functions]


def _tool(function: Any, path: Path) -> Tool:
    if inspect.iscoroutinefunction(function):
        raise RequestError(f"[{path.name}] {function.__name__} must be a plain function, got an async one. Wrap it.")
    with ForeignCode(lambda error: _indescribable(path, function, error)):
        schema = get_json_schema(function)
    schema["function"].pop("return", None)  # no template has a place for it
    return Tool(function.__name__, schema, path)


def _indescribable(path: Path, function: Any, error: BaseException) -> RequestError:
    return RequestError(
        f"[{path.name}] {function.__name__} must have type hints and a docstring that describes it and each argument, "
        f"got {say(error)}. Add them."
    )


def _import(path: Path) -> ModuleType:
    def refuse(error: BaseException) -> RequestError:
        return RequestError(f"[{path.name}] must be importable, got {say(error)}. Correct it.")

    if not path.is_file() or (spec := importlib.util.spec_from_file_location(_MODULE, path)) is None:
        raise RequestError(f"[tools] {path} must be a Python file, got none. Check the path.")
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with ForeignCode(refuse):
            spec.loader.exec_module(module)
    except SystemExit as error:  # a script's last line would end the chat
        raise refuse(error) from error
    return module

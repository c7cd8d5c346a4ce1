"""Tools of an MCP server: described, called, failing and slow ones, and programs that are no server."""

import sys
from pathlib import Path

import pytest

from flash_moe_mlx import RequestError
from flash_moe_mlx.chat.mcp_tools import McpServer

pytest.importorskip("mcp", reason="needs mcp: pip install 'flash_moe_mlx[mcp]'")

SERVER = f"{sys.executable} {Path(__file__).resolve().parents[1] / 'support' / 'mcp_server.py'}"


def test_tools_are_described_and_called():
    with McpServer(SERVER) as server:
        shout, sleep = server.tools
        assert (shout.name, sleep.name) == ("shout", "sleep")
        function = shout.schema["function"]
        assert function["description"] == "Say it louder." and "text" in function["parameters"]["properties"]
        assert shout.run({"text": "hello"}).text == "HELLO"
        assert len(shout.run({"text": "x" * 100}, max_characters=10).text) == 10
        assert not shout.run({"text": ""}).ok
        slow = sleep.run({"seconds": 30}, timeout_seconds=0.5)
        assert not slow.ok and "no result within 0.5 seconds" in slow.text
    assert not server._thread.is_alive()


@pytest.mark.parametrize("command", ["no-such-program-at-all", f"{sys.executable} -c pass"])
def test_programs_that_are_no_server_are_refused(command: str):
    with pytest.raises(RequestError, match="must be a program that speaks MCP"):
        McpServer(command)


def test_without_the_package_there_is_a_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(RequestError, match=r"is not installed.*\[mcp\]"):
        McpServer(SERVER)

"""An MCP server with two tools, for tests."""

import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("test")


@server.tool()
def shout(text: str) -> str:
    """Say it louder."""
    if not text:
        raise ValueError("nothing to say")
    return text.upper()


@server.tool()
def sleep(seconds: float) -> str:
    """Wait."""
    time.sleep(seconds)
    return "awake"


if __name__ == "__main__":
    server.run()

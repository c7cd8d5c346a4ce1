"""Tools of MCP servers: programs that offer tools over their standard input and output. Needs the extra ``mcp``."""

import asyncio
import concurrent.futures
import shlex
import threading
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..formats.foreign import ForeignCode, say
from ..installation import install_command
from .tools import ToolResult

START_SECONDS = 60.0
END_SECONDS = 10.0


@dataclass(frozen=True)
class McpTool:
    """A tool of a running MCP server; used as a `Tool` is.

    Attributes:
        name: The tool's name.
        schema: Its description in the form that chat templates take.
        server: The server.
    """

    name: str
    schema: dict[str, Any]
    server: "McpServer" = field(repr=False)

    def run(
        self, arguments: Mapping[str, Any], *, timeout_seconds: float = 30.0, max_characters: int = 8000
    ) -> ToolResult:
        """Call the tool. Errors and timeouts are results that are not ok."""
        return self.server.call(self.name, dict(arguments), timeout_seconds, max_characters)


class McpServer:
    """A running MCP server. A context manager that ends it.

    Its protocol runs on an event loop in a thread of its own, so that a call can be given up after a time.
    """

    def __init__(self, command: str):
        """Start a server and ask for its tools.

        Args:
            command: Command line, such as "npx some-server --option".

        Raises:
            RequestError: If the package ``mcp`` is missing, or the program can't be started or is no MCP server.
        """
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise RequestError(
                f"[mcp] is not installed, and tools of MCP servers need it. Run: {install_command('mcp')}"
            ) from error
        self.tools: list[McpTool] = []
        self._command = command
        self._session: Any = None
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flash-moe-mcp", daemon=True)
        self._thread.start()
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(), self._loop)
        concurrent.futures.wait(
            (self._started, self._serving), START_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
        )
        if not self._started.done():
            self.close()
            with ForeignCode(self._refusal):
                self._serving.result(0)
            raise self._refusal(TimeoutError(f"no answer within {START_SECONDS:g} seconds"))

    def __enter__(self) -> "McpServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            concurrent.futures.wait((self._serving,), END_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(END_SECONDS)

    def call(self, name: str, arguments: dict[str, Any], timeout_seconds: float, max_characters: int) -> ToolResult:
        """Call a tool, and return its text."""
        calling = asyncio.run_coroutine_threadsafe(self._session.call_tool(name, arguments), self._loop)
        failures: list[BaseException] = []
        result: Any = None
        try:
            with ForeignCode(lambda error: _kept(failures, error)):
                result = calling.result(timeout_seconds)
        except RequestError:
            calling.cancel()
            if isinstance(failures[0], TimeoutError):
                return ToolResult(f"no result within {timeout_seconds:g} seconds", ok=False)
            return ToolResult(say(failures[0]), ok=False)
        text = "\n".join(getattr(part, "text", f"({part.type})") for part in result.content)
        return ToolResult(text[:max_characters], ok=not result.is_error)

    async def _serve(self) -> None:
        """Connect, tell that it has started, and keep the connection until `close`."""
        from mcp import ClientSession, StdioServerParameters
        from mcp.client.stdio import stdio_client

        program, *arguments = shlex.split(self._command)
        async with AsyncExitStack() as stack:
            parameters = StdioServerParameters(command=program, args=arguments)
            streams = await stack.enter_async_context(stdio_client(parameters))
            self._session = await stack.enter_async_context(ClientSession(*streams))
            await self._session.initialize()
            for tool in (await self._session.list_tools()).tools:
                described = {
                    "name": tool.name,
                    "description": tool.description or tool.name,
                    "parameters": tool.input_schema,
                }
                self.tools.append(McpTool(tool.name, {"type": "function", "function": described}, self))
            self._started.set_result(None)
            await self._ending.wait()

    def _refusal(self, error: BaseException) -> RequestError:
        return RequestError(
            f"[mcp] {self._command} must be a program that speaks MCP on its standard input, got {say(error)}. Check "
            "the command."
        )


def _kept(failures: list[BaseException], error: BaseException) -> RequestError:
    failures.append(error)
    return RequestError(f"[mcp] {say(error)}")

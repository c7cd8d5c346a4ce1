"""flash-moe launch: a coding agent against a server that is started for it."""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer

from ..errors import RequestError
from .agents import AGENTS, AgentCommand, Served
from .options import MaxContext, MemoryLimit, Model
from .printable import echo

_HOST = "127.0.0.1"


def launch(
    agent: Annotated[str, typer.Argument(help="claude, codex or opencode.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments for the agent, after --.")] = None,
    model: Model = None,
    port: Annotated[int, typer.Option(help="Port of the server; 0 picks a free one.", min=0, max=65535)] = 0,
    max_context: MaxContext = 65536,
    memory_limit: MemoryLimit = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print how to start server and agent, and start neither.")
    ] = False,
) -> None:
    """Start a coding agent and the local model that serves it.

    The server ends with the agent. It listens on this machine alone, with a key of its own for each launch.

    Examples:
        flash-moe launch claude --model path/to/checkpoint
        flash-moe launch codex --model path/to/checkpoint -- exec "Fix the tests"
        flash-moe launch opencode --model path/to/checkpoint --print --port 8080
    """
    if agent not in AGENTS:
        raise RequestError(f"[agent] must be one of {', '.join(AGENTS)}, got {agent[:40]!r}. See docs/agents.md.")
    from .serve import checkpoint_name

    name = "demo" if model is None else checkpoint_name(model)
    key = "flash-moe" if show else secrets.token_hex(16)
    served = Served(f"http://{_HOST}:{port or 8080 if show else port or _free_port()}", name, key, max_context)
    start = AGENTS[agent](served)
    command = [*start.command, *(arguments or [])]
    options = ["--name", name, "--max-context", str(max_context), "--port", served.address.rpartition(":")[2]]
    for option, value in (("--model", model), ("--memory-limit", memory_limit)):
        options += [option, value] if value is not None else []
    if show:
        echo(shlex.join(["flash-moe", "serve", *options]))
        echo(_shell(start, command))
        return
    if shutil.which(command[0]) is None:
        raise RequestError(f"[agent] {command[0]} must be installed, got no such program. See docs/agents.md.")
    environment = {k: v for k, v in dict(os.environ).items() if k not in start.unset} | start.environment
    with _server(options, key):
        status = _run(command, environment)
    raise typer.Exit(status)


def _shell(start: AgentCommand, command: list[str]) -> str:
    """Return shell lines that start the agent."""
    unset = [f"unset {name}" for name in start.unset]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in start.environment.items()]
    return "\n".join([*unset, *exports, shlex.join(command)])


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _server(options: list[str], key: str) -> Iterator[None]:
    """Start a server, wait until it serves, and end it after."""
    command = [sys.executable, "-m", "flash_moe_mlx", "serve", *options]
    environment = {**os.environ, "FLASH_MOE_API_KEY": key}
    # In a group of its own: Ctrl-C is the agent's.
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                echo(line.rstrip(), err=True)
                if line.startswith("Serving"):
                    break
            else:
                raise RequestError(f"[server] must start, got exit code {process.wait()}. Try flash-moe serve.")
            yield
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run the agent to its end; an interrupt is its to handle."""
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue

"""flash-moe launch: what agents are given, and a server that lives as long as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_moe_mlx.cli.agents import AGENTS, Served

SERVED = Served("http://127.0.0.1:1234", "my model", "secret", 4096)

AGENT = """#!{python}
import os, sys
import anthropic
api = anthropic.Anthropic(max_retries=0)  # its address and key are in the environment
ask = dict(model=os.environ["ANTHROPIC_MODEL"], messages=[dict(role="user", content="Hi")])
assert "ANTHROPIC_API_KEY" not in os.environ
print(sys.argv[1:], api.messages.create(max_tokens=2, **ask).role, api.base_url)
sys.exit(7)
"""


def test_what_each_agent_is_given():
    commands = {name: start(SERVED) for name, start in AGENTS.items()}
    assert [command.command[0] for command in commands.values()] == list(AGENTS)
    claude, codex, opencode = commands.values()
    assert claude.environment["ANTHROPIC_BASE_URL"] == SERVED.address and claude.unset == ("ANTHROPIC_API_KEY",)
    assert claude.environment["ANTHROPIC_AUTH_TOKEN"] == codex.environment["FLASH_MOE_API_KEY"] == "secret"
    assert {v for k, v in claude.environment.items() if k.endswith("_MODEL")} == {"my model"}
    settings = dict(argument.split("=", 1) for argument in codex.command if "=" in argument)
    assert settings["model"] == '"my model"' and settings["model_context_window"] == "4096"
    assert settings["model_providers.flash_moe.base_url"] == '"http://127.0.0.1:1234/v1"'
    assert settings["model_providers.flash_moe.wire_api"] == '"responses"'
    config = json.loads(opencode.environment["OPENCODE_CONFIG_CONTENT"])
    assert config["model"] == "flash-moe/my model"
    assert config["provider"]["flash-moe"]["options"]["baseURL"] == "http://127.0.0.1:1234/v1"


def launch(*arguments: str, path: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PATH": path, "ANTHROPIC_API_KEY": "of another server"}
    command = [sys.executable, "-m", "flash_moe_mlx", "launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_print_starts_nothing():
    done = launch("codex", "--print", "--port", "9000", "--model", "some/model", "--", "exec", "Fix the tests")
    serve, export, command = done.stdout.splitlines()
    assert serve == "flash-moe serve --name some/model --max-context 65536 --port 9000 --model some/model"
    assert export == "export FLASH_MOE_API_KEY=flash-moe" and command.endswith("exec 'Fix the tests'")


@pytest.mark.parametrize(("agent", "said"), [("nobody", "must be one of"), ("opencode", "must be installed")])
def test_agents_that_are_not_there(agent: str, said: str):
    done = launch(agent)
    assert done.returncode == 2 and said in done.stderr


def test_an_agent_and_its_server(tmp_path: Path):
    agent = tmp_path / "claude"
    agent.write_text(AGENT.format(python=sys.executable))
    agent.chmod(0o755)
    done = launch("claude", "--max-context", "256", "--memory-limit", "300MB", "--", "-p", "Hi", path=str(tmp_path))
    assert done.returncode == 7, done.stderr
    assert "['-p', 'Hi'] assistant http://127.0.0.1:" in done.stdout and "Serving demo" in done.stderr
    port = done.stdout.rstrip("/\n").rpartition(":")[2]
    assert not any(f":{int(port):04X} " in line for line in _listening())


def _listening() -> list[str]:
    table = Path("/proc/net/tcp")
    return [line for line in table.read_text().splitlines() if " 0A " in line] if table.exists() else []

"""Environment variables and arguments that point each coding agent to a server."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Served:
    """A server that an agent is to use.

    Attributes:
        address: Its address, without a path.
        model: The model's name.
        key: The API key; any text where the server wants none.
        max_context: The context's length in tokens.
    """

    address: str
    model: str
    key: str
    max_context: int


@dataclass(frozen=True)
class AgentCommand:
    """How an agent is started.

    Attributes:
        command: The program and its arguments.
        environment: Variables to set.
        unset: Variables that would send it elsewhere.
    """

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()


def claude(served: Served) -> AgentCommand:
    """Return how Claude Code is started: it speaks Anthropic's API."""
    sizes = [f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("OPUS", "SONNET", "HAIKU")]
    names = ["ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", *sizes, "CLAUDE_CODE_SUBAGENT_MODEL"]
    environment = {
        "ANTHROPIC_BASE_URL": served.address,
        "ANTHROPIC_AUTH_TOKEN": served.key,
        **dict.fromkeys(names, served.model),
        "API_TIMEOUT_MS": "3600000",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # a text that differs in each request, before all others
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(max(1024, served.max_context // 4)),
    }
    return AgentCommand(["claude"], environment, ("ANTHROPIC_API_KEY",))


def codex(served: Served) -> AgentCommand:
    """Return how Codex is started: it speaks OpenAI's Responses API to a provider named in its arguments."""
    provider = {
        "name": "flash-moe", "base_url": f"{served.address}/v1", "wire_api": "responses",
        "env_key": "FLASH_MOE_API_KEY",
    }  # fmt: skip
    settings = {f"model_providers.flash_moe.{name}": json.dumps(value) for name, value in provider.items()} | {
        "model_providers.flash_moe.stream_idle_timeout_ms": "3600000",
        "model_provider": '"flash_moe"',
        "model": json.dumps(served.model),
        "model_context_window": str(served.max_context),
        "web_search": '"disabled"',
    }
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return AgentCommand(["codex", *arguments], {"FLASH_MOE_API_KEY": served.key})


def opencode(served: Served) -> AgentCommand:
    """Return how OpenCode is started: it speaks OpenAI's chat API, and takes its configuration from a variable."""
    limit = {"context": served.max_context, "output": max(1024, served.max_context // 4)}
    provider = {
        "npm": "@ai-sdk/openai-compatible", "name": "flash-moe",
        "options": {"baseURL": f"{served.address}/v1", "apiKey": served.key, "timeout": False},
        "models": {served.model: {"name": served.model, "tool_call": True, "reasoning": True, "limit": limit}},
    }  # fmt: skip
    model = f"flash-moe/{served.model}"
    config = {"$schema": "https://opencode.ai/config.json", "provider": {"flash-moe": provider}, "model": model,
              "small_model": model}  # fmt: skip
    return AgentCommand(["opencode"], {"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


AGENTS: dict[str, Callable[[Served], AgentCommand]] = {"claude": claude, "codex": codex, "opencode": opencode}

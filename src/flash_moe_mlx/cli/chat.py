"""``flash-moe chat``."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import MemoryLimitError
from ..progress import report
from ..stats import format_bytes
from .options import (
    MEMORY,
    STARTING,
    ActivationBits,
    AdapterPath,
    GpuMemoryLimit,
    Io,
    MaxContext,
    MaxTokens,
    MemoryLimit,
    MinP,
    Model,
    NumExpertsPerTok,
    Revision,
    Seed,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    Verify,
    open_model,
    sampling_of,
)
from .printable import echo, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from .. import PrefixCache
    from .chat_settings import Settings
    from .terminal import Reader

PREFIX_CACHE_SHARE = 0.1  # of the memory limit, where no size is given


def chat(
    model: Model = None,
    system: Annotated[str, typer.Option("--system", "--system-prompt", help="System prompt.")] = "",
    tools: Annotated[
        list[Path] | None,
        typer.Option(
            help="Python file whose functions the model may call; may be repeated.",
            exists=True,
            rich_help_panel="Tools",
        ),
    ] = None,
    mcp: Annotated[
        list[str] | None,
        typer.Option(
            help='Command of an MCP server whose tools the model may call, such as "npx NAME"; may be repeated.',
            rich_help_panel="Tools",
        ),
    ] = None,
    calculator: Annotated[bool, typer.Option(help="Offer the built-in calculator.", rich_help_panel="Tools")] = True,
    tool_timeout: Annotated[
        float, typer.Option(help="Timeout of a tool call, in seconds.", min=0.1, rich_help_panel="Tools")
    ] = 30.0,
    max_tool_rounds: Annotated[
        int, typer.Option(help="Maximum number of rounds of tool calls per turn.", min=0, rich_help_panel="Tools")
    ] = 8,
    thinking: Annotated[
        Literal["show", "hide", "off"], typer.Option(help="Show the thinking dimmed, hide it, or turn it off.")
    ] = "show",
    thinking_budget: Annotated[int | None, typer.Option(help="Maximum thinking tokens per answer.", min=0)] = None,
    max_tokens: MaxTokens = 2048,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            help='Memory for the prefix cache of earlier turns, such as "500MB"; 0 turns it off.',
            rich_help_panel=MEMORY,
        ),
    ] = None,
    memory_limit: MemoryLimit = None,
    gpu_memory_limit: GpuMemoryLimit = None,
    max_context: MaxContext = 8192,
    io: Io = "auto",
    num_experts_per_tok: NumExpertsPerTok = None,
    revision: Revision = None,
    activation_bits: ActivationBits = None,
    verify: Verify = "sample",
    trust_remote_code: TrustRemoteCode = False,
    adapter_path: AdapterPath = None,
) -> None:
    """Chat in the terminal, with tools.

    Enter sends, Alt-Enter or Ctrl-J starts a new line, Ctrl-C stops an answer, /help lists the commands. Each tool
    call is shown and must be confirmed. Tools are not sandboxed: they run with your permissions.

    Examples:
        flash-moe chat
        flash-moe chat --system "Answer in one line." --thinking-budget 500
        flash-moe chat --tools examples/tools/read_file.py --tools examples/tools/shell.py
        echo "What is 17 + 25?" | flash-moe chat --no-calculator
    """
    report(STARTING)
    from rich.console import Console

    from ..chat.conversation import Conversation
    from ..chat.mcp_tools import McpServer, McpTool
    from ..chat.tools import CALCULATOR, Tool, load_tools
    from ..formats.config_files import SamplingDefaults
    from ..runtime.prompt_text import check_text
    from .chat_session import ChatSession
    from .chat_settings import Settings

    check_text(system, "system")
    console = Console(soft_wrap=not sys.stdout.isatty())  # piped output stays plain text
    offered: list[Tool | McpTool] = [tool for path in tools or [] for tool in load_tools(path)]
    settings = Settings(SamplingDefaults(), max_tokens, seed)
    read = _reader(console.is_terminal, lambda: settings.toolbar)
    limits = memory_limit, gpu_memory_limit
    how = (*limits, max_context, io, num_experts_per_tok, revision, activation_bits, verify, trust_remote_code)
    with ExitStack() as stack:
        for command in mcp or []:
            report(f"starting {command}")
            offered += stack.enter_context(McpServer(command)).tools
        loaded, tokenizer = stack.enter_context(open_model(model, *how, adapter_path=adapter_path))
        settings.sampling = sampling_of(loaded.streaming.sampling, temperature, top_p, top_k, min_p)
        if calculator and tokenizer.has_tool_calling:
            offered += load_tools(CALCULATOR)
        conversation = Conversation(
            loaded,
            tokenizer,
            system=system,
            tools=offered,
            prefix_cache=_prefix_cache(loaded, prefix_cache),
            max_tokens=max_tokens,
            sampler=settings.sampler(),
            thinking=thinking != "off",
            thinking_budget=thinking_budget,
            max_tool_rounds=max_tool_rounds,
            tool_timeout_seconds=tool_timeout,
        )
        if console.is_terminal:
            report("")
            console.print(
                _header(model, loaded, settings, [tool.name for tool in offered]),
                style="dim",
                markup=False,
                highlight=False,
            )
        ChatSession(conversation, console, read, thinking, settings).run()


def _header(model: str | None, loaded: Any, settings: "Settings", tools: list[str]) -> str:
    stats = loaded.streaming.stats()
    return printable(
        f"{model or 'the embedded demo'}: {stats.num_slots:,} of {stats.num_experts:,} experts in "
        f"{format_bytes(stats.memory_limit_bytes)}, {loaded.streaming.max_context:,} tokens of context, "
        f"{settings.sampling}; tools: {', '.join(tools) or 'none'}. /help lists the commands."
    )


def _reader(is_terminal: bool, toolbar: "Callable[[], str]") -> "Reader":
    from .chat_session import COMMANDS
    from .terminal import editing_reader, read_line

    if not (is_terminal and sys.stdin.isatty()) or os.environ.get("TERM") == "dumb":
        return read_line
    return editing_reader(Path(typer.get_app_dir("flash-moe")) / "chat_history", list(COMMANDS), toolbar)


def _prefix_cache(model: Any, size: str | None) -> "PrefixCache | None":
    from .. import PrefixCache

    if size == "0":
        return None
    if size is not None:
        return PrefixCache(model, size)
    try:
        return PrefixCache(model, int(model.streaming.limit_bytes * PREFIX_CACHE_SHARE))
    except MemoryLimitError:
        echo("The memory limit has no room for a prefix cache: each turn reads the whole conversation.", err=True)
        return None

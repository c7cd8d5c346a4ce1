"""``flash-moe chat``."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..progress import report
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

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ..formats.config_files import SamplingDefaults
    from .terminal import Reader


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
    from ..chat.tools import Tool, load_tools
    from ..formats.config_files import SamplingDefaults
    from ..runtime.prompt_text import check_text
    from .chat_model import ChatModel
    from .chat_session import ChatSession
    from .chat_settings import Settings

    check_text(system, "system")
    console = Console(soft_wrap=not sys.stdout.isatty())  # piped output stays plain text
    offered: list[Tool | McpTool] = [tool for path in tools or [] for tool in load_tools(path)]
    settings = Settings(SamplingDefaults(), max_tokens, seed)
    read = _reader(console.is_terminal, lambda: settings.toolbar)
    limits = memory_limit, gpu_memory_limit

    def opened(name: str | None) -> "AbstractContextManager[tuple[Any, Any]]":
        own = (revision, adapter_path) if name == model else (None, None)  # they are of the model that was named first
        how = (*limits, max_context, io, num_experts_per_tok, own[0], activation_bits, verify, trust_remote_code)
        return open_model(name, *how, adapter_path=own[1])

    def check(path: Path) -> None:
        from ..planning.planner import Planner
        from ..planning.speed import Speed

        planner = Planner.open(
            path,
            memory_limit=memory_limit,
            gpu_memory_limit=gpu_memory_limit,
            max_context=max_context,
            num_experts_per_tok=num_experts_per_tok,
            speed=Speed(1.0, 0.0),  # not asked for
            trust_remote_code=trust_remote_code,
        )
        planner.divide(planner.limit_bytes)

    def sampling(own: "SamplingDefaults") -> "SamplingDefaults":
        return sampling_of(own, temperature, top_p, top_k, min_p)

    with ExitStack() as stack:
        for command in mcp or []:
            report(f"starting {command}")
            offered += stack.enter_context(McpServer(command)).tools
        used = stack.enter_context(ChatModel(opened, check, sampling, offered, calculator, prefix_cache))
        used.load(model)
        settings.sampling = used.sampling
        conversation = Conversation(
            used.model,
            used.tokenizer,
            system=system,
            tools=used.tools,
            prefix_cache=used.prefix_cache,
            max_tokens=max_tokens,
            sampler=settings.sampler(),
            thinking=thinking != "off",
            thinking_budget=thinking_budget,
            max_tool_rounds=max_tool_rounds,
            tool_timeout_seconds=tool_timeout,
        )
        session = ChatSession(conversation, console, read, thinking, settings, used)
        if console.is_terminal:
            report("")
            session.greet()
        session.run()


def _reader(is_terminal: bool, toolbar: "Callable[[], str]") -> "Reader":
    from .chat_session import COMMANDS
    from .terminal import editing_reader, read_line

    if not (is_terminal and sys.stdin.isatty()):
        return read_line
    from prompt_toolkit.utils import is_dumb_terminal

    if is_dumb_terminal():
        return read_line
    return editing_reader(Path(typer.get_app_dir("flash-moe")) / "chat_history", list(COMMANDS), toolbar)

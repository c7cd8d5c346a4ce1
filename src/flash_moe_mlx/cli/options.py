"""Options and helpers that commands share: help with examples, loading the model, machine-readable output."""

import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import RequestError
from ..installation import install_command
from ..progress import report
from .help import PanelCommand, PanelGroup
from .printable import escaped

if TYPE_CHECKING:
    from ..formats.config_files import SamplingDefaults

# Panels of the help: what options and commands are about.
MODEL, MEMORY, SAMPLING = "Model", "Memory and speed", "Sampling"
USE, CHOOSE, PREPARE = "Use a model", "Choose a model", "Prepare and measure"

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Directory, hub repository, or name from flash-moe models. Default: the demo.",
        show_default=False, rich_help_panel=MODEL,
    ),
]  # fmt: skip
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help='Maximum memory, such as "8GB" or "7.5GiB". Default: a safe share of this machine.', rich_help_panel=MEMORY
    ),
]
GpuMemoryLimit = Annotated[
    str | None,
    typer.Option(help="Maximum memory of a CUDA GPU. Default: a safe share of it.", rich_help_panel=MEMORY),
]
MaxContext = Annotated[
    int,
    typer.Option(help="Context length to reserve memory for (prompt plus answer), in tokens.", rich_help_panel=MEMORY),
]
Io = Annotated[
    Literal["auto", "mmap", "pread", "direct"],
    typer.Option(help="How experts are read: through the page cache, past it, or as measured.", rich_help_panel=MEMORY),
]
NumExpertsPerTok = Annotated[
    int | None,
    typer.Option(
        help="Experts per token. Fewer than the model's own is faster but changes the output.", rich_help_panel=MEMORY
    ),
]
ActivationBits = Annotated[
    int | None,
    typer.Option(
        help="8: quantise activations to 8 bits on the CPU. Faster, slightly less accurate.", rich_help_panel=MEMORY
    ),
]
Verify = Annotated[
    Literal["sample", "full", "none"],
    typer.Option(help="Packed records to check against their checksums.", rich_help_panel=MODEL),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the hub repository.", rich_help_panel=MODEL)
]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens", "-n", help="Maximum number of tokens to generate; -1 for no limit.", rich_help_panel=SAMPLING
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "--temp",
        help="Sampling temperature; 0: the likeliest token. Default: the model's own; in generate 0.",
        min=0,
        rich_help_panel=SAMPLING,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the likeliest tokens up to this total probability; 1: all.",
        min=0.001,
        max=1,
        rich_help_panel=SAMPLING,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Sample from this many of the likeliest tokens; 0 for all.", min=0, rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop tokens below this share of the top probability.", min=0, max=1, rich_help_panel=SAMPLING),
]
Seed = Annotated[
    int | None, typer.Option(help="Random seed, for repeatable sampling.", min=0, rich_help_panel=SAMPLING)
]
AdapterPath = Annotated[
    str | None,
    typer.Option(
        help="Directory of a LoRA adapter by mlx_lm.lora, of dense modules alone.", metavar="DIR", rich_help_panel=MODEL
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python files that come with the checkpoint.", rich_help_panel=MODEL),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


STARTING = "starting: importing MLX and transformers"


def add_command(app: typer.Typer, function: Callable[..., None], panel: str | None = None) -> None:
    """Register a command whose docstring is its help, in a panel of the list of commands."""
    text, examples = _help(function)
    app.command(cls=PanelCommand, help=text, epilog=examples, rich_help_panel=panel)(function)


def add_group(app: typer.Typer, group: typer.Typer, function: Callable[..., None], panel: str) -> None:
    """Register a command with subcommands; ``function`` is its callback."""
    text, examples = _help(function)
    app.add_typer(group, cls=PanelGroup, name=function.__name__, help=text, epilog=examples, rich_help_panel=panel)


def _help(function: Callable[..., None]) -> tuple[str, str]:
    """Return a docstring's text, and its examples marked as not to be wrapped."""
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
    return text, f"\b\nExamples:\n{examples}"


def model_path(model: str | None) -> str:
    """Return the path or repository of the named model, or the path of the embedded demo."""
    if model is None:
        return str(files("flash_moe_mlx") / "demo")
    if "/" in model or os.path.exists(model):
        return model
    from ..planning.presets import repository_of

    return repository_of(model)


@contextmanager
def open_model(
    model: str | None,
    memory_limit: str | None,
    gpu_memory_limit: str | None,
    max_context: int,
    io: str,
    num_experts_per_tok: int | None,
    revision: str | None,
    activation_bits: int | None,
    verify: str,
    trust_remote_code: bool = False,
    *,
    adapter_path: str | None = None,
    alone: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Load the model and its tokenizer with a command's options, and close the model at the end.

    Where ranks share the experts, rank 0 leads: the other ranks follow it here until it ends, and then exit. A command
    that must run ``alone`` is refused.
    """
    report(STARTING)
    from .. import load
    from ..runtime.following import led

    loaded: Any = load(
        model_path(model),
        memory_limit=memory_limit,
        gpu_memory_limit=gpu_memory_limit,
        max_context=max_context,
        io=io,
        num_experts_per_tok=num_experts_per_tok,
        revision=revision,
        activation_bits=activation_bits,
        verify=verify != "none" and verify,
        trust_remote_code=trust_remote_code,
        adapter_path=adapter_path,
    )
    with loaded[0].streaming as engine:
        if alone and engine.ranks > 1:
            raise RequestError(
                f"[flash-moe] this command must run in one process, got {engine.ranks} ranks. Start it alone."
            )
        with led(loaded[0]) as is_mine:
            if not is_mine:
                raise typer.Exit
            yield loaded


def leads() -> bool:
    """Return whether this process is rank 0, or on its own. Joins the ranks that it was started with."""
    from ..experts.ranks import join_ranks

    ranks = join_ranks()
    return ranks is None or ranks.rank == 0


def sampling_of(
    own: "SamplingDefaults", temperature: float | None, top_p: float | None, top_k: int | None, min_p: float | None
) -> "SamplingDefaults":
    """Return the model's own sampling with a command's options in place of what they name."""
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def sampler(sampling: "SamplingDefaults", seed: int | None) -> Callable[[Any], Any]:
    """Return mlx_lm's sampler."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    if seed is not None:
        mx.random.seed(seed)
    return make_sampler(temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p)


def print_json(value: Any) -> None:
    """Print the single JSON document of ``--json``; all other output goes to stderr."""
    report("")
    typer.echo(escaped(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)))


def missing_extra(package: str, extra: str) -> RequestError:
    """Return the error for a command whose optional dependencies are not installed."""
    return RequestError(f"[{package}] is not installed, and this needs it. Run: {install_command(extra)}")

"""What commands have in common: help with examples, the model and how it is loaded, machine-readable output."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .printable import escaped

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Checkpoint directory or hub repository; the embedded demo without it.",
        show_default=False,
    ),
]  # fmt: skip
MemoryLimit = Annotated[
    str | None,
    typer.Option(help='Hard bound, such as "8GB" or "7.5GiB"; a safe share of this machine without it.'),
]
GpuMemoryLimit = Annotated[
    str | None,
    typer.Option(help="Hard bound on a CUDA GPU's own memory; a safe share of it without it."),
]
MaxContext = Annotated[int, typer.Option(help="Tokens of prompt and answer that there must be room for.")]
Io = Annotated[str, typer.Option(help="How experts are read: auto, mmap, pread or direct.")]
NumExpertsPerTok = Annotated[
    int | None, typer.Option(help="Experts a token. Fewer than the model's own is faster and lossy.")
]
ActivationBits = Annotated[
    int | None, typer.Option(help="8 rounds what is multiplied with 4-bit weights on the CPU: faster and lossy.")
]
Verify = Annotated[str, typer.Option(help="Packed records compared with their checksums: sample, full or none.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of an answer; -1 for no limit.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; more is more random.", min=0)]
TopP = Annotated[
    float,
    typer.Option(help="Sample from the likeliest tokens of this probability; 1 is all.", min=0.001, max=1),
]
TopK = Annotated[int, typer.Option(help="Sample from this many of the likeliest tokens; 0 for all.", min=0)]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this times the likeliest.", min=0, max=1)]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", min=0)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files that come with the checkpoint.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def add_command(app: typer.Typer, function: Callable[..., None]) -> None:
    """Register a command whose docstring is its help."""
    text, examples = _help(function)
    app.command(help=text, epilog=examples)(function)


def add_group(app: typer.Typer, group: typer.Typer, function: Callable[..., None]) -> None:
    """Register a command with subcommands; ``function`` is its callback."""
    text, examples = _help(function)
    app.add_typer(group, name=function.__name__, help=text, epilog=examples)


def _help(function: Callable[..., None]) -> tuple[str, str]:
    """A docstring's text, and its examples marked as not to be wrapped."""
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
    return text, f"\b\nExamples:\n{examples}"


def model_path(model: str | None) -> str:
    """The model that is meant: the one named, or the embedded demo."""
    return str(files("flash_moe_mlx") / "demo") if model is None else model


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
) -> Iterator[tuple[Any, Any]]:
    """The model and its tokenizer, loaded as a command's options say; closed at the end."""
    from .. import load

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
    )
    with loaded[0].streaming:
        yield loaded


def sampler(temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None) -> Callable[[Any], Any]:
    """mlx_lm's sampler, as a command's options say."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    if seed is not None:
        mx.random.seed(seed)
    return make_sampler(temp=temperature, top_p=top_p, top_k=top_k, min_p=min_p)


def print_json(value: Any) -> None:
    """Print the one document of ``--json``, with whatever else is printed left to stderr."""
    typer.echo(escaped(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)))


def missing_extra(package: str, extra: str) -> RequestError:
    """The error of a command whose libraries are not installed."""
    return RequestError(
        f"[flash-moe] {package} must be installed for this, got none. Run: pip install 'flash_moe_mlx[{extra}]'"
    )

"""``flash-moe quality``: perplexity of a checkpoint on a text, and its distance from another checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from ..progress import report
from .options import (
    MEMORY,
    STARTING,
    ActivationBits,
    GpuMemoryLimit,
    Io,
    Json,
    MemoryLimit,
    Model,
    NumExpertsPerTok,
    TrustRemoteCode,
    Verify,
    model_path,
    print_json,
)
from .tables import print_rows


def quality(
    text: Annotated[Path, typer.Argument(help="File of plain text, UTF-8.")],
    model: Model = None,
    against: Annotated[
        str | None,
        typer.Option(
            help='Reference: another checkpoint with the same tokenizer, or "self": the model at its own settings.',
            metavar="MODEL",
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window; each starts from an empty context.", min=2)] = 512,
    step: Annotated[
        int | None,
        typer.Option(help="Maximum number of tokens per pass; 1 predicts as decoding does. Default: a window.", min=1),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Number of the text's tokens to use. Default: all.", min=2)
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="File that keeps finished windows. Run again with it to resume.")
    ] = None,
    scratch: Annotated[
        str,
        typer.Option(
            help="With --against: disk for logits that await the other model; a window's always fit.",
            rich_help_panel=MEMORY,
        ),
    ] = "2GB",
    memory_limit: MemoryLimit = None,
    gpu_memory_limit: GpuMemoryLimit = None,
    io: Io = "auto",
    num_experts_per_tok: NumExpertsPerTok = None,
    activation_bits: ActivationBits = None,
    verify: Verify = "sample",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure perplexity on a text, and the distance from a reference.

    With --against, prints KL divergence and the share of tokens at which both find the same one likeliest: a pack
    against its source, or --num-experts-per-tok against the model's own. One of the two is loaded at a time, so the
    memory limit is each one's.

    Examples:
        flash-moe quality book.txt -m Qwen3.5-35B-A3B-4bit --against Qwen3.5-35B-A3B --journal windows.jsonl
        flash-moe quality book.txt --num-experts-per-tok 2 --against self --json
    """
    report(STARTING)
    from .. import quality as measure

    try:
        content = text.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"[quality] {text} must be UTF-8 text, got {error.reason}. Convert it.") from error
    found = measure(
        model_path(model),
        content,
        against=None if against is None else model_path(model if against == "self" else against),
        num_experts_per_tok=num_experts_per_tok,
        activation_bits=activation_bits,
        window=window,
        step=step,
        max_tokens=max_tokens,
        journal=journal,
        scratch=scratch,
        memory_limit=memory_limit,
        gpu_memory_limit=gpu_memory_limit,
        io=io,
        verify=verify != "none" and verify,
        trust_remote_code=trust_remote_code,
    )
    if json:
        print_json(found.to_json())
    else:
        print_rows(found.rows())

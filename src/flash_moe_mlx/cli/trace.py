"""``flash-moe trace``: record which experts a model's routers pick."""

from pathlib import Path
from typing import Annotated

import typer

from ..progress import report
from .options import (
    STARTING,
    ActivationBits,
    GpuMemoryLimit,
    Io,
    Json,
    MaxContext,
    MemoryLimit,
    Model,
    NumExpertsPerTok,
    Revision,
    TrustRemoteCode,
    Verify,
    open_model,
    print_json,
)
from .printable import echo


def trace(
    prompt: Annotated[str, typer.Argument(help="Prompt text.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace file to write.")] = Path("routing.npz"),
    model: Model = None,
    system: Annotated[str, typer.Option("--system", "--system-prompt", help="System prompt.")] = "",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Maximum number of tokens to generate.", min=1)
    ] = 256,
    memory_limit: MemoryLimit = None,
    gpu_memory_limit: GpuMemoryLimit = None,
    max_context: MaxContext = 8192,
    io: Io = "auto",
    num_experts_per_tok: NumExpertsPerTok = None,
    revision: Revision = None,
    activation_bits: ActivationBits = None,
    verify: Verify = "sample",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Record an answer's routing, for simulate and plan.

    Examples:
        flash-moe trace "What is 17 + 25?" --output routing.npz
    """
    report(STARTING)
    from .. import chat_prompt, stream_generate
    from ..runtime.prompt_text import check_text

    check_text(prompt)
    check_text(system, "system")
    limits = memory_limit, gpu_memory_limit
    how = (*limits, max_context, io, num_experts_per_tok, revision, activation_bits, verify, trust_remote_code)
    with open_model(model, *how, alone=True) as (loaded, tokenizer):
        messages = [{"role": "system", "content": system}] if system else []
        tokens, _ = chat_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}])
        text = ""
        with loaded.streaming.trace(output):
            for response in stream_generate(loaded, tokenizer, tokens, max_tokens):
                text += response.text
                if not json:
                    echo(response.text, nl=False)
        stats = loaded.streaming.stats()
    if json:
        figures = {"tokens": stats.tokens, "hit_rate": stats.hit_rate, "num_slots": stats.num_slots}
        print_json({"trace": str(output), "text": text, **figures})
        return
    echo(f"\n\n{stats.tokens} tokens in {output}; hit rate {stats.hit_rate:.1%} with {stats.num_slots} slots.")

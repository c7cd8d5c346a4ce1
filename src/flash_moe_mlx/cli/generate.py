"""``flash-moe generate``."""

from typing import Annotated

import typer

from .options import Io, MaxContext, MemoryLimit, Model, NumExpertsPerTok, Revision, open_model


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate; -1 for no limit.")] = 256,
    memory_limit: MemoryLimit = None,
    max_context: MaxContext = 8192,
    io: Io = "auto",
    num_experts_per_tok: NumExpertsPerTok = None,
    revision: Revision = None,
) -> None:
    """Generate an answer to a prompt.

    Examples:
        flash-moe generate "What is 17 + 25?"
    """
    from .. import stream_generate

    with open_model(model, memory_limit, max_context, io, num_experts_per_tok, revision) as (loaded, tokenizer):
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for response in stream_generate(loaded, tokenizer, tokens, max_tokens):
            typer.echo(response.text, nl=False)
    typer.echo()

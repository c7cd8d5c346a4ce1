"""``flash-moe generate``."""

import sys
from typing import Annotated, Any

import typer

from ..errors import RequestError
from ..progress import report
from ..stats import format_bytes
from .options import (
    STARTING,
    ActivationBits,
    AdapterPath,
    GpuMemoryLimit,
    Io,
    Json,
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
    leads,
    open_model,
    print_json,
    sampler,
    sampling_of,
)
from .printable import echo

MAX_STDIN_CHARACTERS = 1 << 24  # more than any context holds; standard input may be endless


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Prompt text; read from standard input if omitted or -.")] = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt, as mlx_lm.generate takes it.", hidden=True)
    ] = None,
    model: Model = None,
    system: Annotated[str, typer.Option("--system", "--system-prompt", help="System prompt.")] = "",
    raw: Annotated[
        bool,
        typer.Option("--raw", "--ignore-chat-template", help="Continue the raw prompt; don't apply the chat template."),
    ] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
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
    stats: Annotated[
        bool | None, typer.Option(help="Print speeds and the hit rate to standard error. Default: on a terminal.")
    ] = None,
    json: Json = False,
) -> None:
    """Generate an answer and stream it to the terminal.

    Examples:
        flash-moe generate "What is 17 + 25?"
        flash-moe generate --json --memory-limit 14MB --max-context 128 "Tell me a story about a small fox."
        echo "Explain mixture-of-experts in one line." | flash-moe generate
    """
    if prompt_option is not None:
        if prompt is not None:
            raise RequestError("[prompt] must be given once, got an argument and --prompt. Leave one out.")
        prompt = prompt_option
    if prompt == "-":  # standard input, as for mlx_lm.generate
        prompt = None
    is_leading = prompt is not None or leads()
    if not is_leading:
        prompt = ""  # rank 0 has it
    if prompt is None:
        if sys.stdin.isatty():
            raise RequestError('[prompt] must be given, got none. Try flash-moe generate "Hello".')
        prompt = sys.stdin.read(MAX_STDIN_CHARACTERS + 1).rstrip("\n")
        if len(prompt) > MAX_STDIN_CHARACTERS:
            raise RequestError(
                f"[prompt] must have at most {MAX_STDIN_CHARACTERS} characters, got more on standard input. Shorten it."
            )
    if is_leading and not raw and not prompt.strip():
        raise RequestError('[prompt] must have text, got none. Try flash-moe generate "Hello".')
    report(STARTING)
    from .. import stream_generate
    from ..chat.text import AnswerText
    from ..formats.config_files import SamplingDefaults
    from ..runtime.prompt_text import check_text

    check_text(prompt)
    check_text(system, "system")

    limits = memory_limit, gpu_memory_limit
    how = (*limits, max_context, io, num_experts_per_tok, revision, activation_bits, verify, trust_remote_code)
    with open_model(model, *how, adapter_path=adapter_path) as (loaded, tokenizer):
        text, words = "", AnswerText(tokenizer, message=not raw)
        for response in stream_generate(
            loaded,
            tokenizer,
            prompt if raw else _messages(tokenizer, prompt, system),
            max_tokens,
            sampler=sampler(sampling_of(SamplingDefaults(), temperature, top_p, top_k, min_p), seed),
        ):
            piece = "" if response.token in tokenizer.eos_token_ids else words.piece(response.token)
            text += piece
            if not json:
                # A pipe gets the model's exact output; a terminal gets it without control characters.
                report("")
                (echo if sys.stdout.isatty() else typer.echo)(piece, nl=False)
        if json:
            print_json({"text": text, **_figures(response, loaded.streaming.stats())})
            return
        echo()
        if sys.stderr.isatty() if stats is None else stats:
            echo(_summary(response), err=True)


def _summary(response: Any) -> str:
    return (
        f"{response.prompt_tokens:,} prompt tokens, {response.prompt_tps:.1f} tok/s; "
        f"{response.generation_tokens:,} tokens, {response.generation_tps:.1f} tok/s; "
        f"hit rate {response.streaming.hit_rate:.0%}, {format_bytes(response.streaming.bytes_read)} read"
    )


def _messages(tokenizer: Any, prompt: str, system: str) -> list[int]:
    from .. import chat_prompt

    if not tokenizer.has_chat_template:
        raise RequestError("[prompt] the tokenizer must have a chat template, got none. Use --raw.")
    messages = [{"role": "system", "content": system}] if system else []
    return chat_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}])[0]


def _figures(response: Any, stats: Any) -> dict[str, Any]:
    streaming = response.streaming
    return {
        "finish_reason": response.finish_reason,
        "usage": {
            "prompt_tokens": response.prompt_tokens,
            "completion_tokens": response.generation_tokens,
            "total_tokens": response.prompt_tokens + response.generation_tokens,
        },
        "prompt_tps": response.prompt_tps,
        "generation_tps": response.generation_tps,
        "streaming": {
            "hit_rate": streaming.hit_rate,
            "hits": streaming.hits,
            "misses": streaming.misses,
            "bytes_read": streaming.bytes_read,
            "read_seconds": streaming.read_seconds,
        },
        "memory": {
            "limit_bytes": stats.memory_limit_bytes,
            "peak_bytes": stats.peak_memory_bytes,
            "num_slots": stats.num_slots,
            "num_experts": stats.num_experts,
        },
        "io": stats.io,
        "lossy": list(stats.lossy),
    }

"""``flash-moe bench``: the speed of a model. Its subcommands measure components."""

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from ..progress import report
from ..stats import format_bytes
from ..system import can_drop_pages, drop_pages
from .options import (
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
    add_command,
    model_path,
    open_model,
    print_json,
)
from .printable import echo
from .tables import print_table

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 128,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens to generate.", min=2)] = 64,
    runs: Annotated[int, typer.Option(help="Measured runs, after one uncounted warm-up run that compiles.", min=1)] = 3,
    cold: Annotated[
        bool, typer.Option("--cold", help="Before each run, empty the expert slots and the model's page cache.")
    ] = False,
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
    """Measure prefill and decode speed, and the expert hit rate.

    Examples:
        flash-moe bench --memory-limit 14MB --max-context 128 --prompt-tokens 32 --max-tokens 8 --runs 1
        flash-moe bench --json --max-tokens 8
    """
    if context.invoked_subcommand is not None:
        return
    directory = _local(model) if cold else None
    limits = memory_limit, gpu_memory_limit
    how = (*limits, max_context, io, num_experts_per_tok, revision, activation_bits, verify, trust_remote_code)
    with open_model(model, *how) as (loaded, tokenizer):
        measured = []
        for run in range(runs + 1):
            report(f"run {run} of {runs}" if run else "warming up")
            if directory is not None:
                loaded.streaming.clear()
                _drop_pages(directory)
            figures = _run(loaded, tokenizer, prompt_tokens, max_tokens)
            measured += [figures] if run else []
        stats = loaded.streaming.stats()
        result = {
            "model": model or "demo",
            "state": "cold" if cold else "warm",
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "memory_limit_bytes": stats.memory_limit_bytes,
            "num_slots": stats.num_slots,
            "num_experts": stats.num_experts,
            "io": stats.io,
            "lossy": list(stats.lossy),
            "runs": measured,
            "median_generation_tps": statistics.median(run["generation_tps"] for run in measured),
        }
    if json:
        print_json(result)
        return
    echo(
        f"{result['model']}, {result['state']}, {prompt_tokens} prompt tokens, {max_tokens} generated, "
        f"{stats.num_slots:,} of {stats.num_experts:,} experts in slots"
    )
    head = ["run", "prefill tok/s", "decode tok/s", "hit rate", "read", "waiting for reads"]
    rows = [
        [
            str(number),
            f"{run['prompt_tps']:.1f}",
            f"{run['generation_tps']:.1f}",
            f"{run['hit_rate']:.1%}",
            format_bytes(int(run["bytes_read"])),
            f"{run['read_seconds']:.2f} s",
        ]
        for number, run in enumerate(measured, 1)
    ]
    print_table(head, rows, right=head)
    echo(f"median decode {result['median_generation_tps']:.1f} tok/s")


def kernels(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes, one sample: a smoke test, not a measurement.")
    ] = False,
    json: Json = False,
) -> None:
    """Time our kernels against MLX's and mlx-lm's.

    Both do the same work on this machine's backend. Covers MoE layers, quantised products and the gated delta rule at
    the dimensions of three models. On a GPU, compiling the kernels takes minutes; two CPU cores need more than half an
    hour without --quick.

    Examples:
        flash-moe bench kernels --quick
    """
    from ..lab.kernel_table import FULL, QUICK, Layers, Table, standard_work

    size = QUICK if quick else FULL
    table = Table(size, (lambda line: None) if json else echo)
    for measure in standard_work(size, Layers()):
        table.add(measure())
    if json:
        print_json(table.as_json())


def _run(model: Any, tokenizer: Any, prompt_tokens: int, max_tokens: int) -> dict[str, float]:
    import mlx.core as mx

    from .. import stream_generate

    ends = mx.array(sorted(tokenizer.eos_token_ids))
    size = min(tokenizer.vocab_size, 500)

    def go_on(_: mx.array, logits: mx.array) -> mx.array:
        logits[..., ends] = -mx.inf  # an end-of-text token would shorten the run
        return logits

    for response in stream_generate(  # noqa: B007
        model,
        tokenizer,
        [i % size for i in range(prompt_tokens)],
        max_tokens,
        logits_processors=[go_on],
        progress=False,
    ):
        pass
    streaming = response.streaming
    return {
        "prompt_tps": response.prompt_tps,
        "generation_tps": response.generation_tps,
        "hit_rate": streaming.hit_rate,
        "bytes_read": streaming.bytes_read,
        "read_seconds": streaming.read_seconds,
    }


def _local(model: str | None) -> Path:
    if not can_drop_pages():
        raise RequestError("[--cold] the system must be able to drop a file's pages, got one that isn't. Leave it out.")
    directory = Path(model_path(model)).expanduser()
    if not directory.is_dir():
        raise RequestError(f"[--cold] the model must be a local directory, got {directory}. Name its directory.")
    return directory


def _drop_pages(directory: Path) -> None:
    for path in directory.rglob("*.safetensors"):
        with path.open("rb") as file:
            if not drop_pages(file.fileno()):
                raise RequestError(
                    f"[--cold] the system must drop the pages of {path.name}, got a refusal. Leave it out, or run "
                    '"sudo purge" before each run.'
                )


add_command(app, kernels)

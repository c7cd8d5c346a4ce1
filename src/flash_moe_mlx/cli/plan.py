"""``flash-moe plan``: predict whether a model fits and how fast it will run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RequestError
from ..planning.presets import find
from ..progress import report
from .options import (
    STARTING,
    GpuMemoryLimit,
    Json,
    MaxContext,
    MemoryLimit,
    Model,
    NumExpertsPerTok,
    Revision,
    TrustRemoteCode,
    model_path,
    print_json,
)
from .printable import echo
from .tables import print_paragraphs, print_rows, print_table

if TYPE_CHECKING:
    from ..planning.plan import Plan

Trace = Annotated[Path | None, typer.Option(help="Routing recorded by flash-moe trace, to predict its hit rate too.")]
DiskRate = Annotated[
    str | None, typer.Option(help='Disk bytes per second, such as "3GB". Default: probe the disk of a local model.')
]
Hosts = Annotated[
    list[int] | None,
    typer.Option(
        help="Number of hosts that share the experts; may be repeated. Says what each needs.",
        min=1,
        rich_help_panel="Several hosts",
    ),
]
LinkUs = Annotated[
    float, typer.Option(help="Microseconds per message between two hosts.", min=0, rich_help_panel="Several hosts")
]
Plot = Annotated[Path | None, typer.Option(help="Plot speed against memory limit to a .png, .svg or .pdf file.")]


def plan(
    name: Annotated[
        str | None, typer.Argument(help="Name from flash-moe models, directory or hub repository; as --model.")
    ] = None,
    model: Model = None,
    memory_limit: MemoryLimit = None,
    gpu_memory_limit: GpuMemoryLimit = None,
    max_context: MaxContext = 8192,
    num_experts_per_tok: NumExpertsPerTok = None,
    trace: Trace = None,
    disk_rate: DiskRate = None,
    hosts: Hosts = None,
    link_us: LinkUs = 40.0,
    plot: Plot = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Predict whether a model fits in memory, and how fast it runs.

    Says where the memory goes, and which limit is best. Reads only headers. For a hub repository this downloads a few
    hundred kilobytes, for a name from flash-moe models nothing. Exits with code 1 if the model doesn't fit.

    Examples:
        flash-moe plan qwen3.5-397b-4bit --memory-limit 34GB --disk-rate 5.5GB
        flash-moe plan --memory-limit 14MB --max-context 128
        flash-moe plan qwen3.5-397b-4bit --memory-limit 34GB --disk-rate 5.5GB --hosts 1 --hosts 2 --hosts 4
        flash-moe plan --json --max-context 128 --disk-rate 3GB
    """
    if name is not None and model is not None:
        raise RequestError(f"[plan] takes one model, got {name} and --model {model}. Leave one out.")
    target = name if name is not None and find(name) is not None else model_path(model if name is None else name)
    report(STARTING)
    from ..config import parse_size
    from ..planning.plan import plan as make_plan
    from ..planning.speed import busy_note

    if plot is not None:
        from ..lab.plot import check_path, save, speed_by_limit

        check_path(plot)  # before anything is measured
    busy = busy_note()
    result = make_plan(
        target,
        memory_limit=memory_limit,
        gpu_memory_limit=gpu_memory_limit,
        max_context=max_context,
        num_experts_per_tok=num_experts_per_tok,
        revision=revision,
        trace=trace,
        disk_bytes_per_second=None if disk_rate is None else parse_size(disk_rate, "disk_rate"),
        trust_remote_code=trust_remote_code,
        hosts=hosts or (),
        link_us=link_us,
    )
    if json:
        print_json(result.to_dict())
    else:
        _print(result, busy)
    if plot is not None:
        save(speed_by_limit(result), plot)
    if not result.fits:
        raise typer.Exit(1)


def _print(result: "Plan", busy: str | None) -> None:
    print_rows(result.rows())
    for head, *rows in result.tables():
        echo()
        print_table(head, rows, right=[name for name in head if name])
    echo()
    print_paragraphs([*result.assumptions, *([busy] if busy else [])])

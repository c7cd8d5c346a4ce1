"""``flash-moe plan``: will it fit, and how fast will it be."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
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

Trace = Annotated[Path | None, typer.Option(help="Recorded routing (flash-moe trace): expect its hit rate too.")]
DiskRate = Annotated[
    str | None, typer.Option(help='What the disk reads a second, such as "3GB"; probed for local models without it.')
]
Plot = Annotated[Path | None, typer.Option(help="Write speed against memory limit as a picture, .png, .svg or .pdf.")]


def plan(
    model: Model = None,
    memory_limit: MemoryLimit = None,
    gpu_memory_limit: GpuMemoryLimit = None,
    max_context: MaxContext = 8192,
    num_experts_per_tok: NumExpertsPerTok = None,
    trace: Trace = None,
    disk_rate: DiskRate = None,
    plot: Plot = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Tell whether a model fits a memory limit, where the bytes go, and how fast it is expected to be.

    Headers alone are read; of a hub repository, by requests for a few hundred kilobytes.

    Examples:
        flash-moe plan --memory-limit 14MB --max-context 128
        flash-moe plan --json --max-context 128 --disk-rate 3GB
    """
    from ..config import parse_size
    from ..planning.plan import plan as make_plan

    result = make_plan(
        model_path(model),
        memory_limit=memory_limit,
        gpu_memory_limit=gpu_memory_limit,
        max_context=max_context,
        num_experts_per_tok=num_experts_per_tok,
        revision=revision,
        trace=trace,
        disk_bytes_per_second=None if disk_rate is None else parse_size(disk_rate),
        trust_remote_code=trust_remote_code,
    )
    if plot is not None:
        from ..lab.plot import save, speed_by_limit

        save(speed_by_limit(result), plot)
    if json:
        print_json(result.to_dict())
    else:
        echo(str(result))

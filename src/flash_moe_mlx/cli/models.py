"""``flash-moe models``: models that people use, and what to expect of them on this machine."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..progress import report
from ..stats import format_bytes, format_rate
from .options import Json, MemoryLimit, print_json
from .printable import echo
from .tables import columns, print_paragraphs, print_table

if TYPE_CHECKING:
    from ..planning.presets import Preset
    from ..planning.speed import Speed


FULL_COLUMNS = 136


def models(
    memory_limit: MemoryLimit = None,
    disk_rate: Annotated[
        str, typer.Option(help='Bytes per second of the disk, such as "5.5GB"; flash-moe doctor measures it.')
    ] = "3GB",
    speed: Annotated[bool, typer.Option(help="Measure this machine for a few seconds, to predict speeds.")] = True,
    json: Json = False,
) -> None:
    """List known models: size, smallest memory limit, expected speed.

    Says which the hub's cache holds. Works without a network. Any name can be used where a command takes --model, and
    with flash-moe plan and pull.

    Examples:
        flash-moe models
        flash-moe models --no-speed
        flash-moe models --memory-limit 34GB --disk-rate 5.5GB --json
    """
    report("importing MLX")
    from ..config import StreamingConfig, parse_size
    from ..ops.backend import backend
    from ..planning.presets import CONTEXT, presets
    from ..planning.speed import busy_note, measure_speed
    from ..runtime.downloads import cached
    from ..runtime.loading import choose_limits

    limit_bytes = choose_limits(StreamingConfig.from_arguments(memory_limit, CONTEXT, None, "auto"))[0]
    rate = parse_size(disk_rate, "disk_rate")
    report("measuring this machine")
    busy = busy_note() if speed else None
    measured = measure_speed(rate) if speed else None
    report("reading the hub's cache")
    present = cached()
    kind = backend()
    known = [_describe(preset, limit_bytes, kind, measured, present) for preset in presets()]
    others = {name: size for name, size in present.items() if name not in {entry["repository"] for entry in known}}
    if json:
        print_json(
            {"memory_limit_bytes": limit_bytes, "disk_bytes_per_second": rate, "models": known, "other_cached": others}
        )
        return
    head = ["name", "repository", "disk", "smallest limit", "experts in RAM", "tok/s", "here"]
    rows = [
        [
            entry["name"],
            entry["repository"],
            format_bytes(entry["checkpoint_bytes"]),
            format_bytes(entry["smallest_limit_bytes"]),
            f"{entry['share_in_memory']:.0%}" if entry["fits"] else "does not fit",
            format_rate(entry["tokens_per_second"]) if entry["tokens_per_second"] else "",
            "yes" if entry["cached_bytes"] else "",
        ]
        for entry in known
    ]
    right = head[2:6]
    if columns() < FULL_COLUMNS:  # the repositories are what doesn't fit
        head, rows = head[:1] + head[2:], [row[:1] + row[2:] for row in rows]
    print_table(head, rows, right)
    if others:
        echo()
        print_table(["also in the hub's cache", "size"], [[k, format_bytes(v)] for k, v in others.items()], ["size"])
    notes = [
        f"At a limit of {format_bytes(limit_bytes)} and {CONTEXT:,} tokens of context; sizes are computed from the "
        "models' dimensions, without vision towers."
    ]
    if speed:
        notes[0] += f" Speeds are estimates for a disk of {format_bytes(rate)}/s and local routing: see flash-moe plan."
    notes += [busy] if busy else []
    echo()
    print_paragraphs([*notes, "Download one: flash-moe pull NAME. Then: flash-moe chat --model NAME."])


def _describe(
    preset: "Preset", limit_bytes: int, backend: str, speed: "Speed | None", present: dict[str, int]
) -> dict[str, Any]:
    from ..planning.preset_figures import expect

    figures = preset.figures
    smallest = figures.smallest_limit_bytes(backend)
    fits = limit_bytes >= smallest
    slots = figures.slots(limit_bytes, backend)
    rate = expect(figures, slots, speed)[1] if fits and speed is not None else None
    return {
        "name": preset.name,
        "repository": preset.repository,
        "experts": preset.experts,
        "checkpoint_bytes": figures.checkpoint_bytes,
        "smallest_limit_bytes": smallest,
        "fits": fits,
        "share_in_memory": slots / figures.num_experts if fits else 0.0,
        "tokens_per_second": rate,
        "cached_bytes": present.get(preset.repository, 0),
    }

"""``flash-moe pack``: rewrite a checkpoint so that each expert is one aligned read."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import RequestError
from ..stats import format_bytes
from .options import Json, Revision, print_json
from .printable import echo
from .tables import print_rows

if TYPE_CHECKING:
    from ..packing import ShareRequest


def pack(
    source: Annotated[str, typer.Argument(help="Checkpoint directory, or repository on the hub.")],
    destination: Annotated[Path, typer.Argument(help="Output directory: empty, or left by an interrupted run.")],
    bits: Annotated[str, typer.Option(help="Bits per expert weight: 2, 3, 4, 5, 6, 8 or unchanged.")] = "4",
    group_size: Annotated[int, typer.Option(help="Number of weights that share a scale: 32, 64 or 128.")] = 64,
    down_bits: Annotated[int | None, typer.Option(help="Bits for down_proj, overriding --bits.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Bits for some layers, such as 0-3=6 or 40=8; may be repeated.")
    ] = None,
    dense: Annotated[
        Literal["keep", "quantize", "auto"], typer.Option(help="How to treat the other tensors.")
    ] = "auto",
    from_hub: Annotated[
        bool, typer.Option("--from-hub", help="Download one shard at a time and delete it once packed.")
    ] = False,
    revision: Revision = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an earlier run and start over.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Only what rank i of N needs, such as 0/2: its share of the experts, and all else.",
            metavar="I/N",
            rich_help_panel="Several hosts",
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            help="All shares of N ranks, each in a folder of its own.", metavar="N", rich_help_panel="Several hosts"
        ),
    ] = None,
    placement: Annotated[
        Path | None,
        typer.Option(
            help="Plan file that says which rank holds which experts. Default: dealt out by number.",
            rich_help_panel="Several hosts",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print sizes, time and disk space needed.")] = False,
    json: Json = False,
) -> None:
    """Rewrite a checkpoint, each expert as one checksummed read.

    May change the bits of the weights too. Safe to interrupt: run the same command again to resume.

    Examples:
        flash-moe pack Qwen/Qwen3.5-35B-A3B packed --bits 4 --down-bits 6 --from-hub
        flash-moe pack Qwen3.5-35B-A3B-4bit packed --bits unchanged
        flash-moe pack Qwen3.5-35B-A3B packed-6 --layers 0-3=6 --dry-run
        flash-moe pack Qwen/Qwen3.5-35B-A3B mine --shard 0/2 --from-hub
    """
    from ..packing import PackSettings, open_packing

    settings = PackSettings(
        None if bits == "unchanged" else _integer("--bits", bits), group_size, down_bits, _layer_bits(layers), dense
    )
    results = []
    for target, share in _targets(destination.expanduser(), shard, shards, placement):
        with open_packing(
            source, target, settings, from_hub=from_hub, revision=revision, restart=restart, share=share
        ) as packing:
            if dry_run:
                estimate = packing.estimate()
                results.append(estimate.to_json())
                if not json:
                    print_rows(estimate.rows() if shards is None else [("share", str(target)), *estimate.rows()])
                continue
            started = time.perf_counter()
            try:
                packing.run(progress=not json)
            except KeyboardInterrupt:
                echo("Stopped. What was done is kept: the same command resumes.", err=True)
                raise
            lossy, nbytes = packing.plan.lossy, packing.plan.result_bytes
        results.append(
            {"path": str(target), "bytes": nbytes, "lossy": list(lossy), "quantization_error": _errors(target)}
        )
        if not json:
            _print_result(target, nbytes, time.perf_counter() - started, lossy, is_share=share is not None)
    if json:
        print_json(results[0] if shards is None else results)


def _targets(
    destination: Path, shard: str | None, shards: int | None, placement: Path | None
) -> list[tuple[Path, "ShareRequest | None"]]:
    """Return the directories to write, and the share that each holds."""
    from ..formats.packed_share import share_folder
    from ..packing import parse_share

    if shards is None:
        return [(destination, parse_share(shard, placement))]
    if shard is not None:
        raise RequestError(f"[--shards] writes every share, got --shard {shard} too. Leave one out.")
    if shards < 2:
        raise RequestError(f"[--shards] must be at least 2, got {shards}. Leave it out for a whole checkpoint.")
    return [
        (destination / share_folder(rank, shards), parse_share(f"{rank}/{shards}", placement)) for rank in range(shards)
    ]


def _print_result(target: Path, nbytes: int, seconds: float, lossy: Sequence[str], *, is_share: bool) -> None:
    echo(str(target))
    use = (
        "mlx.launch starts the ranks that load it: docs/distributed.md"
        if is_share
        else f"flash-moe chat --model {target}"
    )
    echo(f"{format_bytes(nbytes)} in {seconds:.0f} s. Use it: {use}", err=True)
    for choice in lossy:
        echo(f"lossy: {choice}")
    for projection, error in _errors(target).items():
        echo(f"{projection}: error {error['relative']:.2%} of the weights' size, at most {error['max']:.3g}")


def _errors(directory: Path) -> dict[str, dict[str, float]]:
    from ..formats.packed_format import read_manifest

    manifest = read_manifest(directory)
    return dict(manifest.quantization_error) if manifest else {}


def _layer_bits(texts: list[str] | None) -> dict[int, int]:
    """Parse ``0-3=6`` and ``40=8`` into bits by layer."""
    chosen: dict[int, int] = {}
    for text in texts or []:
        span, _, bits = text.partition("=")
        first, _, last = span.partition("-")
        numbers = [_integer("--layers", part, text) for part in (first, last or first, bits)]
        if numbers[1] - numbers[0] > 10_000:
            raise RequestError(f"[--layers] must name layers, such as 0-3=6, got {text!r}.")
        chosen |= dict.fromkeys(range(numbers[0], numbers[1] + 1), numbers[2])
    return chosen


def _integer(option: str, text: str, whole: str | None = None) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        example = 'a number, or "unchanged"' if whole is None else "layers and bits, such as 0-3=6"
        raise RequestError(f"[{option}] must be {example}, got {whole or text!r}.")
    return int(text)

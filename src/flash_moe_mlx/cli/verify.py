"""``flash-moe verify``: check a checkpoint against its headers, config.json and checksums."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from .options import Json, print_json
from .tables import print_rows


def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    full: Annotated[bool, typer.Option("--full", help="Read every byte instead of a sample of the records.")] = False,
    against: Annotated[Path | None, typer.Option(help="Source checkpoint to compare some records with.")] = None,
    json: Json = False,
) -> None:
    """Check a checkpoint's structure, shapes and checksums.

    Exits with code 1 if there are problems.

    Examples:
        flash-moe verify packed --full
        flash-moe verify packed --against Qwen3.5-35B-A3B-4bit --json
    """
    from ..packing.verification import verify as check
    from ..progress import Progress, reporting

    if not path.expanduser().is_dir():
        raise RequestError(f"[verify] {path} is no directory. Name a checkpoint's directory.")
    with reporting(not json, "verify") as report:
        result = check(path, full=full, against=against, progress=lambda done, total: report(Progress("", done, total)))
    if json:
        print_json(result.to_json())
    else:
        print_rows((name, value.replace("full=True reads all", "--full reads all")) for name, value in result.rows())
    if not result.ok:
        raise typer.Exit(1)

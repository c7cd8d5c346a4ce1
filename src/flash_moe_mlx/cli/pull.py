"""``flash-moe pull``: download a model into the hub's cache."""

from typing import Annotated

import typer

from ..progress import report
from ..stats import format_bytes
from .options import Json, Revision, print_json
from .printable import echo


def pull(
    name: Annotated[str, typer.Argument(help="Name from flash-moe models, or a repository on the hub.")],
    revision: Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print sizes and free disk space.")] = False,
    json: Json = False,
) -> None:
    """Download a model into the hub's cache.

    Checks first that it fits on the disk. Safe to interrupt: run the same command again to resume.

    Examples:
        flash-moe pull qwen3.5-35b-4bit
        flash-moe pull mlx-community/Qwen3.5-397B-A17B-4bit --dry-run
    """
    report("asking the hub")
    from ..planning.presets import repository_of, require
    from ..runtime.downloads import fetch, look_up

    repository = repository_of(name)
    if "/" not in repository:
        require(name)
    found = look_up(repository, revision)
    report("")
    figures = {
        "repository": repository,
        "revision": found.revision,
        "bytes": found.total_bytes,
        "missing_bytes": found.missing_bytes,
        "free_bytes": found.free_bytes,
    }
    if not json:
        echo(
            f"{repository}: {format_bytes(found.total_bytes)}, of which {format_bytes(found.missing_bytes)} are to be "
            f"downloaded; {format_bytes(found.free_bytes)} free on the disk.",
            err=True,
        )
    if not dry_run:
        try:
            path = fetch(found)
        except KeyboardInterrupt:
            echo(f"Stopped. The same command resumes: flash-moe pull {name}", err=True)
            raise
        figures["path"] = str(path)
    if json:
        print_json(figures)
    elif not dry_run:
        echo(figures["path"])
        echo(f"Chat with it: flash-moe chat --model {name}", err=True)

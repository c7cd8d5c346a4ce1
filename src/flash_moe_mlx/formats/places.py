"""Locates a model: the one rule that decides between a directory and a repository on the hub."""

import os
from pathlib import Path

from ..errors import CheckpointError


def local_directory(path_or_repo: str | Path, where: str) -> Path | None:
    """Return the path that was named, or None if it names a repository on the hub.

    A name that exists is a path; one of two parts, such as "org/name", is a repository; a `Path` never is.

    Args:
        path_or_repo: Path or repository.
        where: Function that was called, for the error.

    Raises:
        CheckpointError: If it is neither.
    """
    name = os.fspath(path_or_repo)
    # os.path's: they answer for a name that is no path at all too, where Path's raise.
    if os.path.exists(path := os.path.expanduser(name)):
        return Path(path)
    if isinstance(path_or_repo, Path) or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"[{where}] {name} must be a directory or a hub repository, got neither. Check the path.")
    return None

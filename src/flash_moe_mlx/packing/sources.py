"""Where a packing reads from: a directory, or (hub.py) a repository whose shards come one at a time."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Protocol

from ..errors import PackError
from ..formats.checkpoint import Checkpoint
from ..formats.safetensors_header import TensorInfo

_SAMPLES = 64
_SAMPLE_BYTES = 4096


class Source(Protocol):
    """A checkpoint's files, of which some may not be here yet.

    Attributes:
        checkpoint: Opened; its shards' headers are right even where their data isn't here yet.
        by_shard: Whether shards come one at a time.
        name: For the manifest: a directory's or a repository's.
        revision: The commit, or None.
        samples: A hash of samples of its files, or None where the revision says which they are.
        held_bytes: What its shards take on the destination's disk while they are here, at most.
    """

    checkpoint: Checkpoint
    by_shard: bool
    name: str
    revision: str | None
    samples: str | None
    held_bytes: int

    def identity(self) -> dict[str, Any]:
        """What tells this source from another, or from itself changed."""
        ...

    def fetch(self, path: Path) -> None:
        """Make a shard's data readable."""
        ...

    def release(self, path: Path, keep: tuple[TensorInfo, ...]) -> None:
        """A shard's data is not needed any more, but for these tensors."""
        ...

    def is_kept(self, path: Path) -> bool:
        """Whether a shard was released already, and what was to be kept of it can be read."""
        ...

    def check_unchanged(self) -> None:
        """Raises PackError if a file has changed since the packing was begun."""
        ...


class LocalSource:
    """A checkpoint's directory."""

    by_shard = False
    held_bytes = 0

    def __init__(self, directory: Path):
        self.checkpoint = Checkpoint.open(directory)
        self.name = directory.resolve().name
        self.revision: str | None = None
        # A hub's cache: models--org--name/snapshots/<commit>.
        parts = directory.absolute().parts
        if len(parts) >= 3 and parts[-2] == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", parts[-1]):
            self.revision = parts[-1]
            self.name = parts[-3].removeprefix("models--").replace("--", "/")
        self._identity = self._fingerprint()
        hashes = [text.rpartition(" ")[2] for _, text in sorted(self._identity.items())]
        self.samples: str | None = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        return self._identity

    def fetch(self, path: Path) -> None:
        """It is here."""

    def release(self, path: Path, keep: tuple[TensorInfo, ...]) -> None:
        """It stays."""

    def is_kept(self, path: Path) -> bool:
        return True

    def check_unchanged(self) -> None:
        now = self._fingerprint()
        for name, stated in self._identity.items():
            if now[name] != stated:
                raise PackError(
                    f"[pack] {name} must stay as it is while it is packed, got another one. "
                    "Begin anew with restart=True (--restart)."
                )

    def _fingerprint(self) -> dict[str, Any]:
        files = {info.path for info in self.checkpoint.tensors.values()}
        files.add(self.checkpoint.directory / "config.json")
        return {path.relative_to(self.checkpoint.directory).as_posix(): fingerprint(path) for path in sorted(files)}


def fingerprint(path: Path) -> str:
    """A file's length, time of change, and a hash of its first megabyte and of samples all over it.

    Another file in its place is noticed, whatever its time says, unless it differs between the samples only.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            digest.update(file.read(1 << 20))
            last = max(status.st_size - _SAMPLE_BYTES, 0)
            for number in range(_SAMPLES):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, number * last // (_SAMPLES - 1)))
    except OSError as error:
        raise PackError(f"[pack] {path} must be readable, got {error}. Check the file.") from error
    return f"{status.st_size} {status.st_mtime_ns} {digest.hexdigest()[:16]}"


def header_bytes(path: Path) -> bytes:
    """A safetensors file's bytes before its data."""
    with path.open("rb") as file:
        start = file.read(8)
        return start + file.read(int.from_bytes(start, "little"))

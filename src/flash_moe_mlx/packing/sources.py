"""Sources of a packing: a directory, or (hub.py) a repository whose shards arrive one at a time."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import PackError
from ..formats.checkpoint import Checkpoint
from ..formats.safetensors_header import TensorInfo

_SAMPLES = 64
_SAMPLE_BYTES = 4096


class Source(Protocol):
    """A source checkpoint, some of whose files may not be here yet.

    Attributes:
        checkpoint: The opened checkpoint; its shards' headers are correct even if their data isn't here yet.
        by_shard: Whether shards arrive one at a time.
        name: Name of the directory or repository, for the manifest.
        revision: The commit, or None.
        samples: Hash of samples of its files, or None if the revision identifies them.
        held_bytes: Maximum size of its shards on the destination's disk.
    """

    checkpoint: Checkpoint
    by_shard: bool
    name: str
    revision: str | None
    samples: str | None
    held_bytes: int

    def identity(self) -> dict[str, Any]:
        """Return values that distinguish this source from others and from changed versions of itself."""
        ...

    def fetch_only(self, ranges: Mapping[Path, Sequence[tuple[int, int]]]) -> None:
        """Restrict what `fetch` makes readable to byte ranges (begin, end), by shard."""
        ...

    def fetch(self, path: Path) -> None:
        """Make a shard's data readable."""
        ...

    def release(self, path: Path, keep: tuple[TensorInfo, ...]) -> None:
        """Release a shard's data, except for these tensors."""
        ...

    def is_kept(self, path: Path) -> bool:
        """Return whether a shard was already released and its retained tensors are readable."""
        ...

    def check_unchanged(self) -> None:
        """Raise PackError if a file has changed since the packing started."""
        ...


class LocalSource:
    """A local checkpoint directory."""

    by_shard = False
    held_bytes = 0

    def __init__(self, directory: Path):
        self.checkpoint = Checkpoint.open(directory)
        self.name = directory.resolve().name
        self.revision: str | None = None
        # The hub cache's layout: models--org--name/snapshots/<commit>.
        parts = directory.absolute().parts
        if len(parts) >= 3 and parts[-2] == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", parts[-1]):
            self.revision = parts[-1]
            self.name = parts[-3].removeprefix("models--").replace("--", "/")
        self._identity = self._fingerprint()
        hashes = [text.rpartition(" ")[2] for _, text in sorted(self._identity.items())]
        self.samples: str | None = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        return self._identity

    def fetch_only(self, ranges: Mapping[Path, Sequence[tuple[int, int]]]) -> None:
        """Do nothing: the files are local."""

    def fetch(self, path: Path) -> None:
        """Do nothing: the file is local."""

    def release(self, path: Path, keep: tuple[TensorInfo, ...]) -> None:
        """Do nothing: the file stays."""

    def is_kept(self, path: Path) -> bool:
        return True

    def check_unchanged(self) -> None:
        now = self._fingerprint()
        for name, stated in self._identity.items():
            if now[name] != stated:
                raise PackError(
                    f"[pack] {name} must stay as it is while it is packed, got another one. "
                    "Start over with restart=True (--restart)."
                )

    def _fingerprint(self) -> dict[str, Any]:
        files = {info.path for info in self.checkpoint.tensors.values()}
        files.add(self.checkpoint.directory / "config.json")
        return {path.relative_to(self.checkpoint.directory).as_posix(): fingerprint(path) for path in sorted(files)}


def fingerprint(path: Path) -> str:
    """Return a file's length, modification time, and a hash of its first megabyte and of samples throughout.

    Detects a replaced file, whatever its modification time, unless it differs only between the samples.
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
    """Return a safetensors file's bytes before its data."""
    with path.open("rb") as file:
        start = file.read(8)
        return start + file.read(int.from_bytes(start, "little"))

"""A hub repository whose shards are downloaded one at a time and deleted once they are packed.

Each shard starts as a stand-in: its real header followed by a hole of the real length, which takes no disk space. So
planning from headers works as for a directory. `fetch` replaces the stand-in by the shard; `release` replaces the shard
by a stand-in again, with the few tensors that are still needed.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS
from tqdm.auto import tqdm

from ..errors import CheckpointError, CorruptError, MissingTensorError, PackError
from ..formats.checkpoint import Checkpoint
from ..formats.hub_headers import HTTPError, read_header, read_range
from ..formats.safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_json
from ..formats.shards import INDEX_NAME, complete_by_name
from ..system import full_sync
from .sources import header_bytes
from .workspace import sync_folder

_HASH_BYTES = 8 << 20
_COPY_BYTES = 8 << 20
_CONNECTIONS = 8
_RANGE_BYTES = 64 << 20  # per request, so that several connections share a long range
_ATTEMPTS = 5  # in a row that bring no byte
_RETRY_SECONDS = 0.5


def _copy_range(url: str, file: int, begin: int, end: int) -> None:
    """Download a range into its place in a file, continuing where a connection ended early."""
    failed = 0
    while begin < end:
        start = begin
        try:
            for data in read_range(url, begin, min(end, begin + _RANGE_BYTES)):
                os.pwrite(file, data, begin)
                begin += len(data)
        except HTTPError as error:
            failed = 0 if begin > start else failed + 1
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if failed == _ATTEMPTS or (400 <= status < 500 and status != 429):
                raise
            time.sleep(_RETRY_SECONDS * 2**failed)


class _SilentBar(tqdm):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **(options | {"disable": True}))


class HubSource:
    """One commit of a repository.

    Attributes:
        folder: Folder of the files while they are needed.
        checkpoint: The checkpoint, opened on the stand-ins.
    """

    by_shard = True
    samples: str | None = None

    def __init__(self, name: str, revision: str | None, folder: Path):
        """Resolve the commit, and download the small files and the shards' headers.

        A resumed packing keeps its original commit, wherever the branch points now.

        Raises:
            CheckpointError: If the hub has no such model, or its files are unusable.
            PackError: If the hub can't be reached.
        """
        self.name = name
        self.folder = folder
        self._state = folder.parent / "shards"  # NAME.here and NAME.kept: empty files, the state of each shard
        self._downloads = folder.parent / "downloads"
        for made in (folder, self._state, self._downloads):
            made.mkdir(parents=True, exist_ok=True)
        noted = folder.parent / "revision"
        if revision is None and noted.exists():
            revision = noted.read_text()
        with self._asking("the repository"):
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        self.revision: str | None = info.sha
        noted.write_text(info.sha or "")
        files = {file.rfilename: file for file in info.siblings or ()}
        self._hashes = {file: entry.lfs.sha256 for file, entry in files.items() if entry.lfs}
        self._sizes: dict[str, int] = {}
        for file in sorted(files):
            if "/" not in file and any(fnmatch(file, p) for p in DEFAULT_ALLOW_PATTERNS if "safetensors" not in p):
                self._download(file, folder)
        for file in self._shard_names(sorted(files)):
            if file not in files or files[file].size is None:
                raise MissingTensorError(
                    f"[{name}] every file of {INDEX_NAME} must be there, got none named {file}. Ask its owner."
                )
            self._sizes[file] = int(files[file].size or 0)
            if not (folder / file).exists():
                self._make_stand_in(file, self._header(file), ())
        self.checkpoint = Checkpoint.open(folder)
        self.held_bytes = sum(sorted(self._sizes.values())[-2:])
        self._ranges: dict[str, list[tuple[int, int]]] | None = None

    def identity(self) -> dict[str, Any]:
        return {"repository": self.name, "revision": self.revision, **{n: str(s) for n, s in self._sizes.items()}}

    def check_unchanged(self) -> None:
        """Do nothing: a commit doesn't change."""

    def is_kept(self, path: Path) -> bool:
        """Return whether a shard was released and its retained tensors are here."""
        return (self._state / f"{path.name}.kept").exists()

    def fetch_only(self, ranges: Mapping[Path, Sequence[tuple[int, int]]]) -> None:
        """Let `fetch` download only these byte ranges (begin, end), and leave holes in place of the others."""
        self._ranges = {path.name: list(some) for path, some in ranges.items()}
        sizes = sorted(sum(end - begin for begin, end in some) for some in ranges.values())
        self.held_bytes = sum(sizes[-2:])

    def fetch(self, path: Path) -> None:
        """Download a shard, or its ranges, and replace its stand-in by it.

        Raises:
            PackError: If the download fails, or twice differs from what the hub announced.
        """
        here = self._state / f"{path.name}.here"
        if self._ranges is not None:
            if not here.exists():
                self._fetch_ranges(path, self._ranges.get(path.name, []))
                here.touch()
            return
        if here.exists() and self._problem(path, path) is None:
            return
        problem: str | None = None
        for _ in range(2):
            try:
                downloaded = self._download(path.name, self._downloads)
            except PackError as error:
                problem = f"an error ({error})"
                continue
            problem = self._problem(downloaded, path)
            if problem is None:
                os.replace(downloaded, path)
                sync_folder(self.folder)
                here.touch()
                return
            downloaded.unlink()
        raise PackError(
            f"[{self.name}] {path.name} must be what the hub announced, got {problem}, twice. "
            "Try again later: the same command continues."
        )

    def _fetch_ranges(self, path: Path, ranges: Sequence[tuple[int, int]]) -> None:
        """Write ranges into a stand-in. Their bytes have no checksum of their own to compare with."""
        url = hf_hub_url(self.name, path.name, revision=self.revision)
        with self._asking(path.name), path.open("r+b") as file:
            with ThreadPoolExecutor(_CONNECTIONS, "flash-moe-download") as pool:
                running = [pool.submit(_copy_range, url, file.fileno(), begin, end) for begin, end in ranges]
                try:
                    for future in running:
                        future.result()
                finally:
                    for future in running:
                        future.cancel()
            full_sync(file.fileno())

    def release(self, path: Path, keep: tuple[TensorInfo, ...]) -> None:
        # This order matters: after a crash, a stand-in must not be mistaken for a shard.
        (self._state / f"{path.name}.here").unlink(missing_ok=True)
        sync_folder(self._state)
        self._make_stand_in(path.name, header_bytes(path), keep)
        (self._state / f"{path.name}.kept").touch()

    def _problem(self, candidate: Path, stand_in: Path) -> str | None:
        """Return a description of what is wrong with a downloaded shard, if anything."""
        size = candidate.stat().st_size
        if size != self._sizes[stand_in.name]:
            return f"{size} bytes where {self._sizes[stand_in.name]} were announced"
        if header_bytes(candidate) != header_bytes(stand_in):
            return "another header"
        if expected := self._hashes.get(stand_in.name):
            digest = hashlib.sha256()
            with candidate.open("rb") as file:
                while data := file.read(_HASH_BYTES):
                    digest.update(data)
            if digest.hexdigest() != expected:
                return "other bytes (their SHA-256 differs)"
        return None

    def _make_stand_in(self, name: str, header: bytes, keep: tuple[TensorInfo, ...]) -> None:
        temporary, path = self.folder / f"{name}.new", self.folder / name
        with temporary.open("wb") as file:
            file.write(header)
            for info in keep:
                with path.open("rb") as shard:
                    for begin in range(0, info.nbytes, _COPY_BYTES):
                        shard.seek(info.offset + begin)
                        file.seek(info.offset + begin)
                        file.write(shard.read(min(_COPY_BYTES, info.nbytes - begin)))
            file.truncate(self._sizes[name])
            file.flush()
            full_sync(file.fileno())  # it contains the only copy of the dense bytes
        os.replace(temporary, path)
        sync_folder(self.folder)

    def _shard_names(self, files: list[str]) -> list[str]:
        """Return the names of the checkpoint's shards, by the same rule as `read_shards`."""
        if INDEX_NAME in files:
            weight_map = read_json(self.folder / INDEX_NAME, "Ask its owner.").get("weight_map")
            named = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
            # Without any of its files it is left over from another build. What is absent of it may be of parts that a
            # conversion dropped; else `read_shards` says so.
            if named & set(files) or not complete_by_name(files):
                return sorted(named & set(files)) or sorted(named)
        names = [name for name in files if name.endswith(".safetensors") and "/" not in name]
        return [name for name in names if name.startswith("model")] or names

    def _header(self, name: str) -> bytes:
        """Return a shard's header by requesting its first bytes."""
        with self._asking(name):
            header, _ = read_header(hf_hub_url(self.name, name, revision=self.revision))
        length = int.from_bytes(header[:8], "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, self._sizes[name]):
            raise CorruptError(f"[{self.name}] {name} must be a safetensors file, got {header[:16]!r}. Ask its owner.")
        return header

    def _download(self, name: str, folder: Path) -> Path:
        with self._asking(name):
            return Path(
                hf_hub_download(self.name, name, revision=self.revision, local_dir=folder, tqdm_class=_SilentBar)
            )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except HFValidationError as error:
            raise CheckpointError(f"[pack] {self.name} must be a repository's name, got {error}. Check it.") from error
        except (HTTPError, OSError) as error:
            lines = str(error).splitlines()
            status = getattr(getattr(error, "response", None), "status_code", None)
            kind = CheckpointError if status in (401, 403, 404) else PackError
            raise kind(
                f"[{self.name}] {what} must be served by the hub, got {type(error).__name__}"
                f"{f': {lines[0]}' if lines else ''}. Check the name and the network; then the same command continues."
            ) from error

"""Downloads whole checkpoints into the hub's cache, after checking that they fit the disk."""

import fnmatch
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import CacheNotFound, HFValidationError
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from ..errors import CheckpointError, DiskFullError
from ..formats.foreign import say
from ..formats.hub_headers import HTTPError
from ..formats.packed_format import EXPERTS_FOLDER
from ..formats.places import local_directory
from ..stats import format_bytes

PATTERNS = (*DEFAULT_ALLOW_PATTERNS, f"{EXPERTS_FOLDER}/*.safetensors")
"""Files of a repository that load() reads."""

RESERVE_BYTES = 1 << 30
"""Free space that is left on the disk."""


@dataclass(frozen=True)
class Download:
    """A checkpoint on the hub, compared with the cache.

    Attributes:
        repository: Name on the hub.
        revision: Commit.
        total_bytes: Size of its files.
        missing_bytes: Size of those that are not in the cache.
        free_bytes: Free space on the cache's disk.
    """

    repository: str
    revision: str
    total_bytes: int
    missing_bytes: int
    free_bytes: int


def look_up(repository: str, revision: str | None = None) -> Download:
    """Ask the hub for a repository's files, and compare them with the cache and the disk.

    Raises:
        CheckpointError: If the hub can't be reached or doesn't serve it.
    """
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    # OSError covers "no such repository" and no network.
    except (HTTPError, HFValidationError, OSError) as error:
        raise _unserved(repository, error) from error
    files = {
        sibling.rfilename: sibling.size or 0
        for sibling in info.siblings or ()
        if any(fnmatch.fnmatch(sibling.rfilename, pattern) for pattern in PATTERNS)
    }
    missing = [
        size
        for name, size in files.items()
        if not isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str)
    ]
    cache = Path(HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    return Download(repository, info.sha or "main", sum(files.values()), sum(missing), free_bytes)


def fetch(download: Download) -> Path:
    """Download what is missing, with the hub's own progress bars. Resumes where an earlier try ended.

    Raises:
        CheckpointError: If the download fails.
        DiskFullError: If the disk has too little room. Nothing is downloaded then.
    """
    missing_bytes = download.missing_bytes + RESERVE_BYTES - download.free_bytes
    if download.missing_bytes and missing_bytes > 0:
        raise DiskFullError(
            f"[pull] {download.repository} takes {format_bytes(download.missing_bytes)} more on the disk of the hub's "
            f"cache, which has {format_bytes(download.free_bytes)} free. Free {format_bytes(missing_bytes)}, or set "
            "HF_HOME to a folder on another disk.",
            missing_bytes,
        )
    try:
        return Path(snapshot_download(download.repository, revision=download.revision, allow_patterns=list(PATTERNS)))
    except (HTTPError, HFValidationError, OSError) as error:
        raise _unserved(download.repository, error) from error


def cached() -> dict[str, int]:
    """Return the size of each model in the hub's cache, by repository."""
    try:
        found = scan_cache_dir().repos
    except CacheNotFound:
        return {}
    return {repo.repo_id: repo.size_on_disk for repo in found if repo.repo_type == "model"}


def downloaded(path_or_repo: str) -> Path:
    """Return the directory of a local model: the one named, or a repository's in the hub's cache.

    Raises:
        CheckpointError: If it is neither; says how to download it.
    """
    if (directory := local_directory(path_or_repo, "model")) is not None:
        return directory
    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=list(PATTERNS), local_files_only=True))
    except (HFValidationError, OSError) as error:  # "not in the cache" is an OSError
        raise CheckpointError(
            f"[model] {path_or_repo} must be a directory or in the hub's cache, got neither. "
            f"Run: flash-moe pull {path_or_repo}"
        ) from error


def _unserved(repository: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"[pull] {repository} can't be had from the hub: {say(error)}. Check the name and the network."
    )

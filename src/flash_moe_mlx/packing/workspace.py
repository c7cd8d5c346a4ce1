"""The destination of a packing: its work folder, its lock, its free disk space, and the final step.

All files stay in `WORK_FOLDER` until the end, so that the destination contains either a whole checkpoint or none. Then
they are moved into place one by one, the manifest last.
"""

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from .. import system
from ..errors import DiskFullError, PackError, RequestError
from ..formats.packed_format import EXPERTS_FOLDER, MANIFEST_NAME, WORK_FOLDER
from ..stats import format_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT}

RESERVE_BYTES = 16 << 20
"""Disk space reserved besides the result's files: journal, manifest, tokenizer, file system overhead."""


class Workspace:
    """A destination directory, locked for one packing."""

    def __init__(self, destination: Path):
        self.destination = destination
        self.folder = destination / WORK_FOLDER
        self._files: dict[tuple[str, bool], int] = {}  # by name and whether opened for direct I/O
        self._write_locks: dict[str, threading.Lock] = {}
        self._lock: int | None = None
        self._is_made = self._is_new = False

    def claim(self, *, restart: bool) -> None:
        """Create the destination if necessary, and lock it.

        Raises:
            PackError: If another packer holds the lock, or the directory isn't writable.
            RequestError: If it contains other files.
        """
        try:
            self._is_made = not self.destination.exists()
            self.destination.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.destination, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            foreign = sorted(name for name in os.listdir(self.destination) if name != WORK_FOLDER)
            if foreign and not self.folder.is_dir() and MANIFEST_NAME not in foreign:
                raise RequestError(
                    f"[destination] {self.destination} must be empty or hold what pack began, got {foreign[0]}. "
                    "Name another directory."
                )
            if restart:
                self._clear()
            self._is_new = not self.folder.exists()
            (self.folder / EXPERTS_FOLDER).mkdir(parents=True, exist_ok=True)
        except BlockingIOError as error:
            raise PackError(
                f"[pack] {self.destination} must be packed by one process at a time, got a second one. "
                "Wait for the first, or end it."
            ) from error
        except OSError as error:
            raise self.failure(error, RESERVE_BYTES) from error

    @property
    def journal_path(self) -> Path:
        return self.folder / "journal"

    @property
    def manifest_path(self) -> Path:
        return self.destination / MANIFEST_NAME

    def path_of(self, name: str) -> Path:
        """Return the current path of an output file, unfinished or in its final place."""
        unfinished, finished = self.folder / name, self.destination / name
        return finished if finished.exists() and not unfinished.exists() else unfinished

    def create(self, sizes: Mapping[str, int]) -> set[str]:
        """Create missing output files as sparse files of zeros. Returns their names."""
        made = set()
        for name, nbytes in sizes.items():
            path = self.path_of(name)
            if not path.exists() or path.stat().st_size != nbytes:
                path = self.folder / name
                path.unlink(missing_ok=True)
                with path.open("xb") as file:
                    file.truncate(nbytes)
                made.add(name)
        for folder in (self.folder / EXPERTS_FOLDER, self.folder, self.destination):
            sync_folder(folder)
        return made

    def write(self, name: str, data: memoryview, offset: int) -> None:
        """Write at an offset of an output file; thread-safe. Aligned writes bypass the page cache."""
        view = data.cast("B")
        address = np.frombuffer(view, np.uint8).ctypes.data if view.nbytes else 0
        aligned = view.nbytes > 0 and not (address | offset | view.nbytes) % system.direct_write_alignment()
        file = self._open(name, direct=aligned)
        # The kernel lets one thread at a time write to a file, and the waiting threads would spin.
        with self._write_locks.setdefault(name, threading.Lock()):
            while view:
                written = os.pwrite(file, view, offset)
                view, offset = view[written:], offset + written

    def _open(self, name: str, *, direct: bool) -> int:
        file = self._files.get((name, direct))
        if file is None:
            flags = os.O_RDWR | os.O_CLOEXEC
            try:
                opened = (system.open_direct if direct else os.open)(self.path_of(name), flags)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                opened = os.open(self.path_of(name), flags)  # the file system lacks direct writes
            file = self._files.setdefault((name, direct), opened)
            if file != opened:
                os.close(opened)
        return file

    def sync(self, names: Iterable[str]) -> None:
        """Wait until all data written to these files has reached the disk."""
        for name in names:
            for direct in (False, True):
                if (name, direct) in self._files:
                    system.full_sync(self._files[name, direct])

    def close_files(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def put(self, name: str, data: bytes) -> None:
        """Write a small output file, and wait until it has reached the disk."""
        path = self.folder / name
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            system.full_sync(file.fileno())

    def publish(self, names: list[str], manifest: bytes) -> None:
        """Move the finished files into place, the manifest last, and remove the work folder."""
        self.close_files()
        (self.destination / EXPERTS_FOLDER).mkdir(exist_ok=True)
        for name in names:
            if (self.folder / name).exists():
                os.replace(self.folder / name, self.destination / name)
        sync_folder(self.destination / EXPERTS_FOLDER)
        sync_folder(self.destination)
        self.put(MANIFEST_NAME, manifest)
        os.replace(self.folder / MANIFEST_NAME, self.manifest_path)
        sync_folder(self.destination)
        shutil.rmtree(self.folder)

    def forget_if_new(self) -> None:
        """Remove the work folder of a destination that was new, leaving it as it was before."""
        if self._is_new:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # not empty, or it existed before: keep it
                if self._is_made:
                    self.destination.rmdir()

    def clean(self) -> None:
        """Remove the work folder of a finished result."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def need(self, nbytes: int) -> None:
        """Raise DiskFullError if fewer bytes are free."""
        free = shutil.disk_usage(self.destination).free
        if free < nbytes:
            raise _disk_full(self.destination, nbytes, free)

    def failure(self, error: OSError, remaining_bytes: int) -> PackError:
        """Return the typed error for an OSError raised while writing."""
        if error.errno in _FULL:
            there = next(path for path in (self.destination, *self.destination.absolute().parents) if path.exists())
            return _disk_full(self.destination, remaining_bytes, shutil.disk_usage(there).free)
        return PackError(
            f"[pack] {self.destination} must be writable, got {error}. Check the disk; then the same command continues."
        )

    def close(self) -> None:
        """Close the files and release the lock."""
        self.close_files()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear(self) -> None:
        """Remove an earlier packing's work folder and the weights of its result."""
        self.manifest_path.unlink(missing_ok=True)  # first: without it, the rest isn't a checkpoint
        for folder in (self.folder, self.destination / EXPERTS_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)
        for path in self.destination.glob("model*.safetensors*"):
            path.unlink()


@contextmanager
def locked(destination: Path, *, restart: bool) -> Iterator[Workspace]:
    """Yield a claimed workspace and close it at the end. Raises as `Workspace.claim`."""
    workspace = Workspace(destination)
    try:
        workspace.claim(restart=restart)
        yield workspace
    finally:
        workspace.close()


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries have reached the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _disk_full(destination: Path, needed: int, free: int) -> DiskFullError:
    missing = max(needed - free, 1)
    return DiskFullError(
        f"[pack] the disk of {destination} must have {format_bytes(needed)} free, got {format_bytes(free)}: "
        f"{format_bytes(missing)} are missing. Free them; then the same command continues where it stopped.",
        missing_bytes=missing,
    )

"""Packing: rewrites any checkpoint so that each expert is one aligned record, crash-safely and in bounded memory.

Non-goals: containers other than safetensors, quantisations other than MLX's affine, and in-place conversion.

Tasks (tasks.py, dense.py) are planned from headers only (plan.py), run on threads in any order (run.py) and recorded
in a journal once their bytes have reached the disk. The destination (workspace.py) contains nothing outside its work
folder until the last step.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from ..errors import PackError, RequestError
from ..formats.packed_format import MANIFEST_NAME, SHARE_VERSION, VERSION, read_manifest
from ..formats.places import local_directory
from ..formats.shards import INDEX_NAME
from ..progress import Report, reporting
from .estimate import Estimate, estimate
from .journal import Journal
from .plan import PackPlan, make_plan
from .run import Runner
from .settings import PackSettings
from .shares import ShareRequest, parse_share
from .sources import LocalSource, Source
from .workspace import RESERVE_BYTES, Workspace, locked

_MAX_SMALL_FILE_BYTES = 256 << 20


def pack(
    source: str | Path,
    destination: str | Path,
    *,
    bits: int | None = 4,
    group_size: int = 64,
    down_bits: int | None = None,
    layer_bits: Mapping[int, int] | None = None,
    dense: str = "auto",
    from_hub: bool = False,
    revision: str | None = None,
    restart: bool = False,
    shard: str | None = None,
    placement: str | Path | None = None,
    progress: bool | Report = True,
) -> Path:
    """Write a packed checkpoint, which stores each expert as one aligned, checksummed read.

    Safe to interrupt at any point: call it again to resume. The result has the same bytes.

    Args:
        source: A checkpoint's directory (Hugging Face or MLX), or a repository on the hub.
        destination: Output directory: empty, or left by an interrupted call.
        bits: Bits per expert weight: 2, 3, 4, 5, 6 or 8; None keeps the weights unchanged. Weights that already have
            these bits and this group size are copied; others are quantised, which loses precision.
        group_size: Number of weights that share a scale: 32, 64 or 128.
        down_bits: Bits for down_proj, overriding ``bits``.
        layer_bits: Bits by layer, overriding both.
        dense: "keep" the other tensors as they are, "quantize" them as mlx_lm.convert does, or "auto": quantise what
            is not quantised yet, where ``bits`` is given.
        from_hub: Download one shard at a time from the hub and delete it before the next.
        revision: Branch, tag or commit of the repository.
        restart: Discard the output of an earlier call and start over.
        shard: "i/N" writes only what rank i of N needs, from 0: its experts and all other tensors. None writes all.
        placement: With ``shard``, a plan file that says which rank holds which experts, as ``load`` takes it. None
            deals them out by number.
        progress: Whether to show a progress bar if stderr is a terminal; or a function that takes a `Progress`.

    Returns:
        The destination.

    Raises:
        CheckpointError: If the source is unusable; subclasses say why.
        DiskFullError: If there is too little disk space; says how much is missing.
        PackError: If packing can't continue: another packer, another source, a disk or network failure.
        RequestError: If an argument is invalid.

    Cost: about 1 GB of memory for any model; disk space for the result, plus two shards with ``from_hub``.
    """
    settings = PackSettings(bits, group_size, down_bits, dict(layer_bits or {}), dense)
    target = Path(os.path.expanduser(destination))
    share = parse_share(shard, placement)
    with open_packing(
        source, target, settings, from_hub=from_hub, revision=revision, restart=restart, share=share
    ) as packing:
        packing.run(progress)
    return target


@dataclass(frozen=True)
class Packing:
    """A packing that is ready to run: the destination is locked and the source's headers are read.

    Attributes:
        plan: The plan to carry out.
        is_finished: Whether the destination already contains the result.
    """

    source: Source
    plan: PackPlan
    workspace: Workspace
    is_finished: bool

    def run(self, progress: bool | Report) -> None:
        """Run the remaining tasks. Raises as `pack`."""
        if self.is_finished:
            self.workspace.clean()
            return
        journal = self._open_journal()
        try:
            with reporting(progress, "pack") as report:
                runner = Runner(self.plan, self.source, self.workspace, journal, report)
                self.workspace.need(runner.remaining_bytes + RESERVE_BYTES + self.source.held_bytes)
                runner.run()
                runner.finish(_small_files(self.source.checkpoint.directory))
        finally:
            journal.close()

    def estimate(self) -> Estimate:
        """Estimate sizes, disk space and time, without leaving anything new in the destination."""
        try:
            return estimate(self.plan, self.source, self.workspace, self._remaining_bytes())
        finally:
            self.workspace.forget_if_new()

    def _remaining_bytes(self) -> int:
        if self.is_finished:
            return 0
        journal = self._open_journal()
        try:
            return Runner(self.plan, self.source, self.workspace, journal, lambda moment: None).remaining_bytes
        finally:
            journal.close()

    def _open_journal(self) -> Journal:
        identity = {
            "version": VERSION,
            "mlx": mx.__version__,
            "settings": self.plan.settings.to_json(),
            "tasks": len(self.plan.tasks),
            "source": self.source.identity(),
        }
        if (label := self.plan.share) is not None:
            identity |= {"version": SHARE_VERSION, "share": vars(label)}
        try:
            return Journal(self.workspace.journal_path, identity)
        except OSError as error:
            raise self.workspace.failure(error, self.plan.result_bytes) from error


@contextmanager
def open_packing(
    source: str | Path,
    destination: Path,
    settings: PackSettings,
    *,
    from_hub: bool = False,
    revision: str | None = None,
    restart: bool = False,
    share: ShareRequest | None = None,
) -> Iterator[Packing]:
    """Lock a destination, read the source's headers and plan. Takes the arguments and raises the errors of `pack`."""
    directory = None if from_hub else local_directory(source, "pack")
    if directory is not None and (
        directory.resolve() == destination.resolve() or directory.resolve() in destination.resolve().parents
    ):
        raise RequestError(
            f"[destination] must lie outside the source {directory}, got {destination}. Name another directory."
        )
    with locked(destination, restart=restart) as workspace:
        opened: Source
        if directory is not None:
            opened = LocalSource(directory)
        else:
            from .hub import HubSource

            opened = HubSource(str(source), revision, workspace.folder / "source")
        placed = None if share is None else share.place(opened.checkpoint)
        plan = make_plan(opened.checkpoint, settings, by_shard=opened.by_shard, share=placed)
        if share is not None:
            opened.fetch_only(plan.reads())
        yield Packing(opened, plan, workspace, _is_finished(opened, plan, workspace))


def _is_finished(source: Source, plan: PackPlan, workspace: Workspace) -> bool:
    if not workspace.manifest_path.exists():
        return False
    manifest = read_manifest(workspace.destination)
    same = manifest is not None and (
        manifest.conversion == plan.settings.to_json()
        and manifest.share == plan.share
        and [manifest.source[key] for key in ("name", "revision", "samples")]
        == [source.name, source.revision, source.samples]
    )
    if not same:
        raise PackError(
            f"[pack] {workspace.destination} must hold no other packed checkpoint, got one of another source or share, "
            "or with other settings. Name another directory, or start over with restart=True (--restart)."
        )
    return True


def _small_files(directory: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer, templates and other small files of a model, by name."""
    found = {}
    for path in sorted(directory.iterdir()):
        patterns = [pattern for pattern in DEFAULT_ALLOW_PATTERNS if not pattern.endswith(".safetensors")]
        if not path.is_file() or not any(fnmatch(path.name, pattern) for pattern in patterns):
            continue
        if path.name in ("config.json", INDEX_NAME, MANIFEST_NAME):
            continue
        if path.stat().st_size > _MAX_SMALL_FILE_BYTES:
            raise PackError(
                f"[pack] {path.name} must be a small file, got {path.stat().st_size} bytes. Move it elsewhere."
            )
        found[path.name] = path.read_bytes()
    return found


__all__ = ["Estimate", "PackSettings", "Packing", "ShareRequest", "open_packing", "pack", "parse_share"]

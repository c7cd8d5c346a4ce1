"""Helpers that compare and damage packed checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.packing import dense, plan, run


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes by name, folders within included."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def tensor_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint.dense[name]
    with info.path.open("rb") as file:
        file.seek(info.offset)
        return file.read(info.nbytes)


def expert_parts(checkpoint: Checkpoint) -> dict[tuple[int, int, str], bytes]:
    """Every part of every expert."""
    found = {}
    for layer in checkpoint.moe_layers:
        for part, where in zip(checkpoint.layout(layer).parts, checkpoint.parts(layer), strict=True):
            for expert in range(checkpoint.num_experts(layer)):
                path, offset = where.locate(expert)
                with path.open("rb") as file:
                    file.seek(offset)
                    found[layer, expert, part.name] = file.read(part.nbytes)
    return found


def small_tasks(monkeypatch: pytest.MonkeyPatch, nbytes: int = 1 << 16) -> None:
    """Many tasks, and many entries in the journal, of a small checkpoint, however slow the disk is."""
    for module in (dense, plan):
        monkeypatch.setattr(module, "CHUNK_BYTES", nbytes)
    for name in ("_COMMIT_BYTES", "_UNCOMMITTED_BYTES"):
        monkeypatch.setattr(run, name, 2 * nbytes)


def stop_at(share: float) -> Callable[[run.Progress], None]:
    """A progress function that ends the packing when that share is written."""

    def report(moment: run.Progress) -> None:
        if moment.done >= share * moment.total:
            raise KeyboardInterrupt

    return report

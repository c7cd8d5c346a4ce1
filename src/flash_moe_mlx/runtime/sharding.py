"""Sharding in load(): join the ranks, choose each one's experts, and refuse ranks that are not alike."""

import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import __version__
from ..config import StreamingConfig
from ..errors import RequestError, StoreError
from ..experts.distributed import Share
from ..experts.placement import Placement, check_alike
from ..experts.ranks import RankGroup, join_ranks
from ..formats.checkpoint import Checkpoint
from ..formats.packed_share import share_folder

_SAMPLES, _SAMPLE_BYTES = 64, 4096


@contextmanager
def loading_together(shard: bool | str | Path | None, timeout: float) -> Iterator[RankGroup | None]:
    """Join the ranks that this process was started with; at the end wait until all of them have loaded.

    Args:
        shard: load's argument.
        timeout: Seconds that one rank waits for another.

    Yields:
        The ranks; None if this process is alone or is not to share experts.

    Raises:
        DistributedError: If a rank fails or doesn't come in time.
        RequestError: If an argument is not usable.
    """
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
        raise RequestError(f"[rank_timeout] must be a positive number of seconds, got {timeout!r}. Try 10.")
    ranks = None if shard is False else join_ranks(float(timeout))
    if ranks is None and shard not in (None, False):
        raise RequestError(
            f"[shard] must come with several ranks, got {shard!r} in a process on its own. Start it with mlx.launch."
        )
    if ranks is None:
        yield None
        return
    loaded = False
    try:
        yield ranks
        loaded = True
        # However long the others take, while they show signs of life.
        ranks.gather(1, patient=True)
    finally:
        if not loaded:
            error = sys.exception()
            is_interrupt = isinstance(error, KeyboardInterrupt)
            ranks.fail("was interrupted while it loaded" if is_interrupt else f"could not load: {error}")


def own_directory(directory: Path, ranks: RankGroup | None) -> Path:
    """Return this rank's folder of a directory with a folder for each rank's share; any other directory as it is.

    Raises:
        RequestError: If there are such folders, and none is for this rank and this number of ranks.
    """
    if (directory / "config.json").exists():
        return directory
    folders = sorted(path.name for path in directory.glob("*-of-*") if path.is_dir())
    if not folders:
        return directory
    if ranks is not None and (name := share_folder(ranks.rank, ranks.size)) in folders:
        return directory / name
    raise RequestError(
        f"[load] {directory} must hold this process's share of the experts, got {', '.join(folders[:4])} for "
        f"{_in_words(ranks)}. Start as many ranks with mlx.launch, or pack the source again for these."
    )


def _stored_placement(checkpoint: Checkpoint, ranks: RankGroup | None) -> Placement | None:
    """Return the placement that a checkpoint's share is part of, or None if it has all experts.

    Raises:
        RequestError: If it is another rank's, or of another number of ranks.
    """
    manifest = checkpoint.manifest
    if manifest is None or (label := manifest.share) is None:
        return None
    if ranks is None or (label.rank, label.ranks) != (ranks.rank, ranks.size):
        raise RequestError(
            f"[load] {checkpoint.directory} must be this process's share of the experts, got {label} for "
            f"{_in_words(ranks)}. Start {label.ranks} ranks with mlx.launch, each with its own share; "
            "a process on its own needs the whole checkpoint."
        )
    owners = {n: np.array(layer.share.owners) for n, layer in manifest.layers.items() if layer.share}
    return Placement(label.ranks, owners)


def _in_words(ranks: RankGroup | None) -> str:
    return "a process on its own" if ranks is None else f"rank {ranks.rank} of {ranks.size}"


def share_experts(
    ranks: RankGroup | None, checkpoint: Checkpoint, streaming: StreamingConfig, shard: bool | str | Path | None
) -> Share | None:
    """Choose who keeps which experts, and check that all ranks mean the same.

    Some ranks may have the whole checkpoint, and others their share of it.

    Args:
        ranks: The group; None if this process is on its own.
        checkpoint: Opened.
        streaming: load's arguments.
        shard: load's argument.

    Raises:
        DistributedError: If ranks differ in version, checkpoint, arguments or plan.
        RequestError: If the plan is not usable, or the checkpoint is another rank's share.
    """
    num_experts = {layer: checkpoint.num_experts(layer) for layer in checkpoint.moe_layers}
    placement = _stored_placement(checkpoint, ranks)
    if ranks is None:
        return None
    is_open = placement is None and not isinstance(shard, str | Path)
    if isinstance(shard, str | Path):
        chosen = Placement.read(shard, num_experts, ranks.size)
        if placement is not None and chosen.digest != placement.digest:
            raise RequestError(
                f"[shard] {shard} must be the plan that {checkpoint.directory} was packed with, got another. "
                "Leave shard out: the checkpoint has its plan."
            )
        placement = chosen
    elif placement is None:
        placement = Placement.by_number(num_experts, ranks.size)
    arguments = (
        streaming.max_context,
        streaming.num_experts_per_tok,
        streaming.prefill_step_size,
        streaming.activation_bits,
    )
    own = {
        "version": zlib.crc32(f"{__version__} {mx.__version__}".encode()),
        "checkpoint": _fingerprint(checkpoint),
        "max_context, num_experts_per_tok and activation_bits": zlib.crc32(repr(arguments).encode()),
        "plan of shards": placement.digest,
    }
    check_alike({what: ranks.gather(value, patient=True) for what, value in own.items()})
    return Share(ranks, placement, is_open=all(ranks.gather(int(is_open), patient=True)))


def _fingerprint(checkpoint: Checkpoint) -> int:
    """Return a checksum of names and shapes, and of a few of the dense weights' bytes.

    It doesn't depend on which experts the files hold.
    """
    total = zlib.crc32(repr(sorted(checkpoint.config.items(), key=str)).encode())
    for layer in checkpoint.moe_layers:
        total = zlib.crc32(repr((checkpoint.num_experts(layer), checkpoint.layout(layer).parts)).encode(), total)
    dense = sorted(checkpoint.dense.items())
    for name, info in dense:
        total = zlib.crc32(f"{name} {info.dtype} {info.shape}".encode(), total)
    for _, info in dense[:: max(len(dense) // _SAMPLES, 1)]:
        try:
            with open(info.path, "rb") as file:
                file.seek(info.offset + info.nbytes // 2)
                total = zlib.crc32(file.read(min(_SAMPLE_BYTES, info.nbytes - info.nbytes // 2)), total)
        except OSError as error:
            raise StoreError(f"[load] {os.fspath(info.path)} must be readable, got {error}. Check the disk.") from error
    return total

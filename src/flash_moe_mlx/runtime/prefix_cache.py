"""PrefixCache: a model's states at points of earlier prompts, which later prompts resume from instead of prefilling.

A KV cache can be cut back to any earlier token, but a recurrent state (GatedDeltaNet) can't. States are therefore
copied at points that later prompts are likely to share, and a prompt resumes from the longest matching copy.

mlx_lm's LRUPromptCache is not used: it keeps a dict per token, which no limit counts, and leaves nothing to feed when a
prompt is stored whole. Here entries are few and large, so they are searched linearly.
"""

import copy
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..config import parse_size
from ..errors import RequestError, StoreError
from ..stats import format_bytes
from .prefix_files import PrefixFiles

logger = logging.getLogger(__name__)

MIN_SNAPSHOT_TOKENS = 16
"""Shortest prefix worth storing: recurrent states are as large for one token as for many."""

_NOTE_SECONDS = 60.0

NEW_SNAPSHOTS = 3
"""Maximum number of points copied per prompt: the first (a system prompt) and the last ones."""


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """Caches after ``tokens``. They are copied, never advanced."""

    tokens: np.ndarray
    caches: list[Any]
    nbytes: int
    trimmable: bool

    def usable(self, tokens: np.ndarray) -> int:
        """Return how many of ``tokens`` need no prefill with this; the last token is always fed, to get logits."""
        common = common_prefix(self.tokens, tokens[:-1])
        return common if self.trimmable or common == len(self.tokens) else 0


class PrefixCache:
    """States at points of one model's earlier prompts, within a limit of bytes. Safe to use from several threads.

    Its bytes come out of the model's memory limit: creating it shrinks the expert slots, and closing it lets them
    grow again. The least recently used copies are evicted first. A context manager.

    Example:
        >>> with PrefixCache(model, "500MB") as cache:
        ...     tokens, points = chat_prompt(tokenizer, messages)
        ...     generate(model, tokenizer, tokens, prefix_cache=cache, snapshot_at=points)

    Attributes:
        model: The model that the states belong to.
        max_bytes: The limit.
    """

    def __init__(
        self,
        model: Any,
        max_bytes: int | str,
        directory: str | Path | None = None,
        *,
        max_directory_bytes: int | str = "10GB",
    ):
        """Reserve the memory, and look through the directory.

        Args:
            model: The model that :func:`flash_moe_mlx.load` returned.
            max_bytes: Bytes, or a text such as "500MB". A conversation keeps about three copies.
            directory: Directory in which copies outlive the process: those of prompts, where at least 512 tokens are
                spared. The experts in memory are noted there too, and read again now. It holds what was said.
            max_directory_bytes: Maximum total size of these files.

        Raises:
            MemoryLimitError: If the model's memory limit can't spare them; names the smallest that can.
            StoreError: If the model's engine is closed, or an expert can't be read.
            RequestError: If a size or the directory can't be used.
        """
        self.model = model
        self.max_bytes = parse_size(max_bytes, "max_bytes")
        self._files: PrefixFiles | None = None
        if directory is not None and model.streaming.ranks > 1:
            raise RequestError(
                f"[PrefixCache] directory must be left out where ranks share the experts, got {directory}: the others "
                "would not have its states. Leave it out."
            )
        if directory is not None:
            self._files = PrefixFiles(model, directory, parse_size(max_directory_bytes, "max_directory_bytes"))
        self._noted = time.monotonic()
        self._lock = threading.Lock()
        self._snapshots: list[_Snapshot] = []  # least recently used first
        self._closed = False
        self._leader = model.streaming.leader
        self._number = 0 if self._leader is None else self._leader.number(self)
        with self._announced("prefix", number=self._number, max_bytes=self.max_bytes):
            model.streaming.add_snapshots(self)
        if self._files is not None and (warmed := self._files.warm_experts()):
            logger.info("%d experts read that were in memory before", warmed)

    def __len__(self) -> int:
        """Return the number of copies held."""
        return len(self._snapshots)

    @property
    def nbytes(self) -> int:
        """Total bytes of the copies held."""
        return sum(snapshot.nbytes for snapshot in self._snapshots)

    def fetch(self, tokens: Sequence[int]) -> tuple[list[Any], int]:
        """Return caches to resume from, owned by the caller, and how many of ``tokens`` they hold (0 if none match).

        Raises:
            StoreError: If the prefix cache is closed.
        """
        wanted = np.asarray(tokens, np.uint32)
        with self._lock:
            self._check_open()
            usable = [(snapshot.usable(wanted), snapshot) for snapshot in self._snapshots]
            shared = sorted((pair for pair in usable if pair[0]), key=lambda pair: -pair[0])
            # Mark every matching prefix as used, the shortest last: it is the likeliest to be shared, so it stays.
            recent = [snapshot for _, snapshot in shared]
            self._snapshots = [s for s in self._snapshots if s not in recent] + recent
        known = shared[0][0] if shared else 0
        if self._files is not None and self._files.longest(wanted) > known:
            loaded = self._files.load(wanted)
            if loaded is not None and loaded[1] > known:
                self.store(tokens[: loaded[1]], loaded[0])
                return loaded
        if not shared:
            return make_prompt_cache(self.model), 0
        count, best = shared[0]
        caches = copy.deepcopy(best.caches)  # shares buffers; MLX copies them before the first write
        if count < len(best.tokens):
            trim_prompt_cache(caches, len(best.tokens) - count)
        return caches, count

    def store(self, tokens: Sequence[int], caches: Sequence[Any], *, lasting: bool = False) -> bool:
        """Store a copy of caches that hold exactly ``tokens``.

        Args:
            tokens: The tokens.
            caches: The caches.
            lasting: Whether to write it to the directory too, if there is one.

        Returns:
            Whether the copy was stored: False if it is too short to be worth it, or larger than ``max_bytes``.
        """
        held = np.array(tokens, np.uint32)
        if len(held) < MIN_SNAPSHOT_TOKENS:
            return False
        self._note_experts()
        with self._lock:
            if covering := [s for s in self._snapshots if _covers(s, held)]:
                self._snapshots = [s for s in self._snapshots if s is not covering[-1]] + [covering[-1]]
                return True
        copies = [_compact(cache) for cache in caches]
        states = [cache.state for cache in copies]
        nbytes = held.nbytes + sum(v.nbytes for _, v in tree_flatten(states) if isinstance(v, mx.array))
        snapshot = _Snapshot(held, copies, nbytes, can_trim_prompt_cache(copies))
        with self._lock:
            if self._closed or nbytes > self.max_bytes:
                logger.info("no snapshot of %d tokens: it has %s", len(held), format_bytes(nbytes))
                return False
            kept = [s for s in self._snapshots if not _covers(snapshot, s.tokens)]
            while sum(s.nbytes for s in kept) + nbytes > self.max_bytes:
                del kept[0]
            self._snapshots = kept
            mx.eval(states)  # evaluated only after evicted copies are freed
            self._snapshots = [*kept, snapshot]
        logger.debug("snapshot of %d tokens, %s", len(held), format_bytes(nbytes))
        if lasting and self._files is not None:
            self._files.save(held, copies)
        return True

    def points(self, snapshot_at: Sequence[int] | None, reused: int, length: int) -> list[int]:
        """Return where to copy a prompt of ``length`` tokens, chosen from ``snapshot_at``; None stands for its end.

        Points shortly after another one, or after the reused prefix, are left out: each costs its own forward pass.
        """
        points: list[int] = []
        for p in sorted([length - 1] if snapshot_at is None else snapshot_at):
            if (points[-1] if points else reused) + MIN_SNAPSHOT_TOKENS <= p < length:
                points.append(p)
        return points if len(points) <= NEW_SNAPSHOTS else [points[0], *points[1 - NEW_SNAPSHOTS :]]

    def clear(self) -> None:
        """Drop all copies. The memory stays reserved."""
        with self._announced("clear", prefix=self._number), self._lock:
            self._snapshots = []

    def close(self) -> None:
        """Drop all copies and return the memory to the expert slots. Later calls do nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
            self._snapshots = []
        if self._files is not None and not closed:
            self._files.save_experts()
        with self._announced("close", prefix=self._number):
            self.model.streaming.remove_snapshots(self)

    def __enter__(self) -> "PrefixCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def number(self) -> int:
        """Number by which other ranks know their copy, if this rank leads them."""
        return self._number

    def _announced(self, op: str, **fields: Any) -> AbstractContextManager[None]:
        if self._leader is None or self._leader is not self.model.streaming.leader:
            return nullcontext()
        return self._leader.announced(op, **fields)  # type: ignore[no-any-return]

    def _note_experts(self) -> None:
        """Note the experts in memory, once a while, for processes that are killed."""
        if self._files is not None and time.monotonic() - self._noted > _NOTE_SECONDS:
            self._noted = time.monotonic()
            self._files.save_experts()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("[PrefixCache] must be open, got a closed one. Make a new one.")


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the longest common prefix of two sequences."""
    size = min(len(a), len(b))
    differing = np.flatnonzero(a[:size] != b[:size])
    return int(differing[0]) if len(differing) else size


def _covers(snapshot: _Snapshot, tokens: np.ndarray) -> bool:
    """Return whether a snapshot makes one of ``tokens`` redundant: it is equal, or can be cut back to them."""
    begins = common_prefix(snapshot.tokens, tokens) == len(tokens)
    return begins and (snapshot.trimmable or len(snapshot.tokens) == len(tokens))


def _compact(cache: Any) -> Any:
    """Copy a cache, lazily, into buffers no larger than its contents."""
    result = copy.deepcopy(cache)
    if isinstance(result, KVCache) and result.keys is not None:
        # A KV cache grows in steps of 256 tokens.
        result.keys, result.values = result.keys[..., : result.offset, :], result.values[..., : result.offset, :]
    result.state = tree_map(lambda value: mx.contiguous(value) if isinstance(value, mx.array) else value, result.state)
    return result

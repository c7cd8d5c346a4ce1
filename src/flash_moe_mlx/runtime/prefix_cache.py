"""PrefixCache: a model's states at points of earlier prompts, to go on from instead of prefilling again.

A KV cache can be cut back to any earlier token, a recurrent state (GatedDeltaNet) can't. So states are copied at
points that later prompts are likely to share, and a prompt goes on from the longest copy that it begins with.

mlx_lm's LRUPromptCache is not used: it keeps a dict for every token, which no limit counts, and leaves nothing to feed
where a prompt is stored whole. Here are few and large entries, so a list of them is searched from end to end.
"""

import copy
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..config import parse_size
from ..errors import StoreError
from ..stats import format_bytes

logger = logging.getLogger(__name__)

MIN_SNAPSHOT_TOKENS = 16
"""A shorter beginning is not worth a copy of the recurrent states, which are as large for one token as for many."""

NEW_SNAPSHOTS = 3
"""Most copies kept of one prompt's points: the first (a system prompt) and the last ones."""


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """Caches after ``tokens``; never advanced, only copied."""

    tokens: np.ndarray
    caches: list[Any]
    nbytes: int
    trimmable: bool

    def usable(self, tokens: np.ndarray) -> int:
        """How many of ``tokens`` need no prefill with this: all but one at most, which gives the logits."""
        common = common_prefix(self.tokens, tokens[:-1])
        return common if self.trimmable or common == len(self.tokens) else 0


class PrefixCache:
    """States at points of earlier prompts of one model, under a limit of bytes. Safe to use from several threads.

    Its bytes come out of the model's memory limit: expert slots shrink by them when it is made, and grow again when
    it is closed. The least recently used copies go first. A context manager.

    Example:
        >>> with PrefixCache(model, "500MB") as cache:
        ...     tokens, points = chat_prompt(tokenizer, messages)
        ...     generate(model, tokenizer, tokens, prefix_cache=cache, snapshot_at=points)

    Attributes:
        model: Whose states these are.
        max_bytes: The limit.
    """

    def __init__(self, model: Any, max_bytes: int | str):
        """Set memory aside.

        Args:
            model: From :func:`flash_moe_mlx.load`.
            max_bytes: Bytes, or a text such as "500MB". A conversation keeps three copies or so.

        Raises:
            MemoryLimitError: If the model's memory limit can't spare them; names the smallest that can.
            StoreError: If the model's engine is closed.
            RequestError: If ``max_bytes`` is not a size.
        """
        self.model = model
        self.max_bytes = parse_size(max_bytes)
        self._lock = threading.Lock()
        self._snapshots: list[_Snapshot] = []  # least recently used first
        self._closed = False
        model.streaming.add_snapshots(self)

    def __len__(self) -> int:
        """Copies held."""
        return len(self._snapshots)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies held."""
        return sum(snapshot.nbytes for snapshot in self._snapshots)

    def fetch(self, tokens: Sequence[int]) -> tuple[list[Any], int]:
        """Caches to go on from, the caller's own, and how many of ``tokens`` they hold: 0 where nothing fits.

        Raises:
            StoreError: If it is closed.
        """
        wanted = np.asarray(tokens, np.uint32)
        with self._lock:
            self._check_open()
            usable = [(snapshot.usable(wanted), snapshot) for snapshot in self._snapshots]
            shared = sorted((pair for pair in usable if pair[0]), key=lambda pair: -pair[0])
            # All that this prompt begins with are in use; of them the shortest, most likely shared, stays longest.
            recent = [snapshot for _, snapshot in shared]
            self._snapshots = [s for s in self._snapshots if s not in recent] + recent
        if not shared:
            return make_prompt_cache(self.model), 0
        count, best = shared[0]
        caches = copy.deepcopy(best.caches)  # shares buffers, which MLX copies before the first write
        if count < len(best.tokens):
            trim_prompt_cache(caches, len(best.tokens) - count)
        return caches, count

    def store(self, tokens: Sequence[int], caches: Sequence[Any]) -> bool:
        """Keep a copy of caches that hold exactly ``tokens``.

        Returns:
            Whether it was kept: not if it is too short to be worth it, or larger than ``max_bytes``.
        """
        held = np.array(tokens, np.uint32)
        if len(held) < MIN_SNAPSHOT_TOKENS:
            return False
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
            mx.eval(states)  # only now: what was evicted is gone
            self._snapshots = [*kept, snapshot]
        logger.debug("snapshot of %d tokens, %s", len(held), format_bytes(nbytes))
        return True

    def points(self, snapshot_at: Sequence[int] | None, reused: int, length: int) -> list[int]:
        """Where a prompt of ``length`` tokens is to be copied, of the points asked for; None asks for its end.

        One that comes soon after another, or after what is reused, is left out: each costs a forward pass of its own.
        """
        points: list[int] = []
        for p in sorted([length - 1] if snapshot_at is None else snapshot_at):
            if (points[-1] if points else reused) + MIN_SNAPSHOT_TOKENS <= p < length:
                points.append(p)
        return points if len(points) <= NEW_SNAPSHOTS else [points[0], *points[1 - NEW_SNAPSHOTS :]]

    def clear(self) -> None:
        """Forget every copy. The memory stays set aside."""
        with self._lock:
            self._snapshots = []

    def close(self) -> None:
        """Forget every copy and give the memory back to the expert slots. Later calls do nothing."""
        with self._lock:
            self._closed = True
            self._snapshots = []
        self.model.streaming.remove_snapshots(self)

    def __enter__(self) -> "PrefixCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("[PrefixCache] must be open, got a closed one. Make a new one.")


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two sequences begin with in common."""
    size = min(len(a), len(b))
    differing = np.flatnonzero(a[:size] != b[:size])
    return int(differing[0]) if len(differing) else size


def _covers(snapshot: _Snapshot, tokens: np.ndarray) -> bool:
    """Whether it serves as one of ``tokens`` would: it is of these, or can be cut back to them."""
    begins = common_prefix(snapshot.tokens, tokens) == len(tokens)
    return begins and (snapshot.trimmable or len(snapshot.tokens) == len(tokens))


def _compact(cache: Any) -> Any:
    """A copy of a cache, lazily, in buffers of its own that are no larger than what they hold."""
    result = copy.deepcopy(cache)
    if isinstance(result, KVCache) and result.keys is not None:
        # It grows by 256 tokens at a time.
        result.keys, result.values = result.keys[..., : result.offset, :], result.values[..., : result.offset, :]
    result.state = tree_map(lambda value: mx.contiguous(value) if isinstance(value, mx.array) else value, result.state)
    return result

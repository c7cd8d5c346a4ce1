"""Commands on several ranks: rank 0 leads, and the others carry out what it announces."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache

from ..errors import FlashMoEError
from ..experts.ranks import END
from ..models.caches import pending_states
from .prefix_cache import PrefixCache

logger = logging.getLogger(__name__)


@contextmanager
def led(model: Any) -> Iterator[bool]:
    """Lead the other ranks within the context, or follow rank 0 until its context ends.

    Yields:
        Whether this process may use the model: true on rank 0 and in a process on its own.

    Raises:
        DistributedError: On a rank that follows, if the group fails.
    """
    engine = model.streaming
    if engine.rank:
        follow(model)
        yield False
        return
    engine.lead()
    try:
        yield True
    finally:
        engine.end_lead()


def follow(model: Any) -> None:
    """Carry out the operations that rank 0 announces, until it ends.

    Raises:
        DistributedError: If the group fails.
    """
    follower = _Follower(model)
    while (command := model.streaming.next_command())["op"] != END:
        try:
            follower.do(**command)
        except (CancelledError, FlashMoEError) as error:
            model.streaming.check_ranks()
            # Rank 0 has seen the same, and decides what follows.
            logger.info("[rank %d] %s: %s", model.streaming.rank, type(error).__name__, error)


class _Follower:
    """Copies of rank 0's conversations and prefix caches, by rank 0's numbers."""

    def __init__(self, model: Any):
        self._model = model
        self._conversations: dict[int, tuple[list[Any], Callable[[], None]]] = {}
        self._fed = mx.zeros((1, 0), mx.uint32)
        self._prefixes: dict[int, PrefixCache] = {}

    def do(self, op: str, dropped: list[int], **fields: Any) -> None:
        for number in dropped:
            self._conversations.pop(number, None)
            if (prefix := self._prefixes.pop(number, None)) is not None:
                prefix.close()
        getattr(self, f"_{op}")(**fields)

    def _lead(self) -> None:
        """Do nothing: later announcements follow."""

    def _begin(
        self, number: int, tokens: list[int], prefix: int | None, max_kv_size: int | None, kv: tuple[int, int, int]
    ) -> None:
        if prefix is None:
            caches = make_prompt_cache(self._model, max_kv_size)
        else:
            caches, _ = self._prefixes[prefix].fetch(tokens)
        self._conversations[number] = caches, lambda: maybe_quantize_kv_cache(caches, *kv)

    def _prefill(self, number: int, tokens: list[int]) -> None:
        caches, quantise = self._conversations[number]
        self._model(mx.array([tokens], mx.uint32), cache=caches, logits_to_keep=0)
        quantise()
        mx.eval(pending_states(caches))
        mx.clear_cache()

    def _start(self, number: int, tokens: list[int]) -> None:
        caches, quantise = self._conversations[number]
        self._fed = mx.array([tokens], mx.uint32)
        logits = self._model(self._fed, cache=caches, logits_to_keep=1)
        quantise()
        mx.eval(logits, pending_states(caches))

    def _diagnose(self, number: int) -> None:
        if number in self._conversations:
            self._model.diagnose(self._fed)

    def _prefix(self, number: int, max_bytes: int) -> None:
        self._prefixes[number] = PrefixCache(self._model, max_bytes)

    def _store(self, number: int, prefix: int, tokens: list[int]) -> None:
        self._prefixes[prefix].store(tokens, self._conversations[number][0])

    def _clear(self, prefix: int) -> None:
        self._prefixes[prefix].clear()

    def _close(self, prefix: int) -> None:
        self._prefixes[prefix].close()

    def _resize(self, limit_bytes: int) -> None:
        self._model.streaming.resize_slots(limit_bytes)

    def _empty(self) -> None:
        self._model.streaming.clear()

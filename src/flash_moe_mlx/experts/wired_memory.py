"""Memory that macOS may neither compress nor swap out: MLX's wired limit, raised while any engine runs.

MLX wires nothing by default. Slots and dense weights would be ordinary memory then, which a Mac compresses when other
programs want some: the first token after a pause has to wait for all of it.
"""

import threading
import weakref

import mlx.core as mx

from .. import system
from ..ops.backend import backend

WIRING_SINCE = (15,)
"""The macOS that has Metal's residency sets."""

_lock = threading.RLock()  # a finalizer may run on a thread that holds it
_shares: dict[int, int] = {}  # bytes, by the share's number
_numbers = iter(range(1 << 62))
_other_bytes = 0  # of arrays that were there before the first share
_before: dict[str, int] = {}  # MLX's limits without any share


class WiredShare:
    """One engine's memory limit, as far as Metal is told of it: the sum of those alive, bounded by the working set.

    Sets MLX's memory limit as well: Metal's command buffers hold what was freed until they end, and MLX waits for
    them where it would exceed that limit. Both are what they were before once the last share is closed. Does nothing
    on other backends; wires nothing before macOS 15.

    MLX asks that the wired limit is not changed while something is evaluated: the engine waits for its own work first.
    """

    def __init__(self, nbytes: int, dense_bytes: int = 0):
        """Take the share.

        Args:
            nbytes: The engine's memory limit.
            dense_bytes: Bytes of it that are in MLX's memory already.
        """
        global _other_bytes
        self._number = next(_numbers)
        self._is_metal = backend() == "metal"
        if self._is_metal:
            with _lock:
                if not _shares:
                    _other_bytes = max(mx.get_active_memory() - dense_bytes, 0)
                _shares[self._number] = nbytes
                _apply()
        # An engine that nobody closed gives its share back when it is collected.
        self._release = weakref.finalize(self, _give_back, self._number)

    def resize(self, nbytes: int) -> None:
        """Change it to another memory limit."""
        with _lock:
            if self._number in _shares:
                _shares[self._number] = nbytes
                _apply()

    def close(self) -> None:
        """Give it back. Later calls do nothing."""
        self._release()


def _apply() -> None:
    wanted = sum(_shares.values())
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if working_set and system.macos_version() >= WIRING_SINCE:
        # More than the working set is an error.
        _before.setdefault("wired", mx.set_wired_limit(min(wanted, working_set)))
    wanted += _other_bytes
    highest = _before.setdefault("memory", mx.set_memory_limit(wanted))
    if wanted > highest:
        mx.set_memory_limit(highest)


def _give_back(number: int) -> None:
    with _lock:
        if _shares.pop(number, None) is None:
            return
        if _shares:
            _apply()
            return
        if "wired" in _before:
            mx.set_wired_limit(_before["wired"])
        mx.set_memory_limit(_before["memory"])
        _before.clear()

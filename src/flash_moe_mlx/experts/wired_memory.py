"""Memory that macOS may neither compress nor swap out: MLX's wired limit, raised while any engine runs.

MLX wires nothing by default. Slots and dense weights would then be ordinary memory, which macOS compresses under
pressure: the first token after a pause would have to wait for all of it.
"""

import threading
import weakref

import mlx.core as mx

from .. import system
from ..ops.backend import backend

WIRING_SINCE = (15,)
"""First macOS version with Metal's residency sets."""

_lock = threading.RLock()  # reentrant: a finalizer may run on the thread that holds it
_shares: dict[int, int] = {}  # bytes by share number
_numbers = iter(range(1 << 62))
_other_bytes = 0  # arrays that existed before the first share
_before: dict[str, int] = {}  # MLX's limits without any share


class WiredShare:
    """One engine's memory limit as reported to Metal: the sum of live shares, bounded by the working set.

    Also sets MLX's memory limit: Metal's command buffers hold freed memory until they end, and MLX waits for them
    rather than exceed that limit. Both limits are restored once the last share is closed. Does nothing on other
    backends; wires nothing before macOS 15.

    MLX requires that the wired limit does not change during an evaluation: the engine first waits for its own work.
    """

    def __init__(self, nbytes: int, dense_bytes: int = 0):
        """Take the share.

        Args:
            nbytes: The engine's memory limit.
            dense_bytes: Bytes of it that MLX has already allocated.
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
        # An engine that nobody closed returns its share when it is garbage-collected.
        self._release = weakref.finalize(self, _give_back, self._number)

    def resize(self, nbytes: int) -> None:
        """Change the share to another memory limit."""
        with _lock:
            if self._number in _shares:
                _shares[self._number] = nbytes
                _apply()

    def close(self) -> None:
        """Return the share. Later calls do nothing."""
        self._release()


def _apply() -> None:
    wanted = sum(_shares.values())
    working_set = system.recommended_working_set_bytes()
    if working_set and system.macos_version() >= WIRING_SINCE:
        # MLX raises an error for more than the working set.
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

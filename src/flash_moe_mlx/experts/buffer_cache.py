"""MLX's process-wide cache of freed buffers: kept small while any engine runs, and restored afterwards."""

import threading
import weakref

import mlx.core as mx

from ..forks import is_forked

_lock = threading.RLock()  # reentrant: a finalizer may run on the thread that holds it
_shares: dict[int, int] = {}  # bytes by share number
_numbers = iter(range(1 << 62))
_limit_before = 0


class BufferCacheShare:
    """One engine's share of MLX's cache of freed buffers. The largest live share sets the limit.

    Each engine counts its own share inside its memory limit, so the largest share is within their sum. After the last
    share is closed, the limit is what it was before the first.
    """

    def __init__(self, nbytes: int):
        global _limit_before
        self._number = next(_numbers)
        with _lock:
            before = mx.set_cache_limit(max([nbytes, *_shares.values()]))
            if not _shares:
                _limit_before = before
            _shares[self._number] = nbytes
        # An engine that nobody closed returns its share when it is garbage-collected.
        self._release = weakref.finalize(self, _give_back, self._number)

    def close(self) -> None:
        """Return the share. Later calls do nothing."""
        self._release()

    def __enter__(self) -> "BufferCacheShare":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _give_back(number: int) -> None:
    if is_forked():  # MLX would wait for threads that don't exist in this process
        return
    with _lock:
        _shares.pop(number, None)
        mx.set_cache_limit(max(_shares.values()) if _shares else _limit_before)

"""MLX's cache of freed buffers: one for the whole process, so kept small while any engine runs, and given back then."""

import threading
import weakref

import mlx.core as mx

from ..forks import is_forked

_lock = threading.RLock()  # a finalizer may run on a thread that holds it
_shares: dict[int, int] = {}  # bytes, by the share's number
_numbers = iter(range(1 << 62))
_limit_before = 0


class BufferCacheShare:
    """What one engine lets MLX keep of freed buffers. The largest share of those alive is the limit.

    Each engine counts its own share inside its memory limit, so that the largest is within their sum.
    What the limit was before the first share, it is again after the last.
    """

    def __init__(self, nbytes: int):
        global _limit_before
        self._number = next(_numbers)
        with _lock:
            before = mx.set_cache_limit(max([nbytes, *_shares.values()]))
            if not _shares:
                _limit_before = before
            _shares[self._number] = nbytes
        # An engine that nobody closed gives its share back when it is collected.
        self._release = weakref.finalize(self, _give_back, self._number)

    def close(self) -> None:
        """Give it back. Later calls do nothing."""
        self._release()

    def __enter__(self) -> "BufferCacheShare":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _give_back(number: int) -> None:
    if is_forked():  # MLX would wait for threads that are not in this process
        return
    with _lock:
        _shares.pop(number, None)
        mx.set_cache_limit(max(_shares.values()) if _shares else _limit_before)

"""Refuses work in a process forked after MLX was used: MLX's threads don't survive the fork, so it would hang."""

import os
import sys
import threading

from .errors import StoreError
from .system import was_forked

_PROBE_SECONDS = 2.0

_in_use = False  # this process, or one it was forked from, has loaded a model
_forked = False  # after that


# Forked from a process that had imported MLX and may have used it; this module may be imported after the fork.
_doubtful = "mlx.core" in sys.modules and was_forked()


def check_process(where: str) -> None:
    """Raise an error in a process that was forked after a model was loaded.

    Args:
        where: Origin named in the message: "load" or "model.streaming".

    Raises:
        StoreError: If this process can't compute.
    """
    if _forked:
        raise StoreError(
            f"[{where}] must be used in the process that loaded the model, got one forked from it (process "
            f'{os.getpid()}). Start processes with multiprocessing\'s "spawn" method and load the model there.'
        )


def is_forked() -> bool:
    """Return whether this process was forked after a model was loaded."""
    return _forked


def begin_use() -> None:
    """Record that this process uses MLX. Called by ``load`` before the first use of MLX.

    Raises:
        StoreError: If this process was forked from one that had used MLX.
    """
    global _in_use, _forked, _doubtful
    check_process("load")
    if _doubtful:
        _forked = not _computes()
        check_process("load")
        _doubtful = False
    _in_use = True


def _computes() -> bool:
    """Return whether MLX still responds on this thread's stream."""
    import mlx.core as mx

    stream = mx.default_stream(mx.default_device())
    probe = threading.Thread(target=mx.synchronize, args=(stream,), daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS)
    return not probe.is_alive()


def _note_fork() -> None:
    global _forked, _doubtful
    _forked = _forked or _in_use
    _doubtful = "mlx.core" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

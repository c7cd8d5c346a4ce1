"""Refuses work in a process forked from one that computed: MLX's threads are not in it, and it would wait for ever."""

import os
import sys
import threading
from pathlib import Path

from .errors import StoreError

_PROBE_SECONDS = 2.0
_PF_FORKNOEXEC = 0x40  # linux/sched.h

_in_use = False  # this process, or one that it was forked from, has loaded a model
_forked = False  # after that


def _was_forked() -> bool:
    """Whether Linux says that this process is a fork that has run no other program since."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & _PF_FORKNOEXEC)


# Forked from a process that had imported MLX, and may have computed with it. This module may come later than the fork.
_doubtful = "mlx.core" in sys.modules and _was_forked()


def check_process(where: str) -> None:
    """Raise in a process that was forked after a model was loaded.

    Args:
        where: Named in the message: "load" or "model.streaming".

    Raises:
        StoreError: If this process can't compute.
    """
    if _forked:
        raise StoreError(
            f"[{where}] must be used in the process that loaded the model, got one forked from it (process "
            f'{os.getpid()}). Start processes with multiprocessing\'s "spawn" method and load the model there.'
        )


def is_forked() -> bool:
    """Whether this process was forked after a model was loaded."""
    return _forked


def begin_use() -> None:
    """Note that this process computes. Called by ``load`` before MLX is asked for anything.

    Raises:
        StoreError: If this process was forked from one that had computed.
    """
    global _in_use, _forked, _doubtful
    check_process("load")
    if _doubtful:
        _forked = not _computes()
        check_process("load")
        _doubtful = False
    _in_use = True


def _computes() -> bool:
    """Whether MLX still answers on this thread's stream."""
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

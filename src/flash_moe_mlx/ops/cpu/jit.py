"""Compiles kernels once and caches them; runs them on the processors this process may use, one at a time."""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np

from ...machine import CGROUP_ROOT

logger = logging.getLogger(__name__)

LOCK = threading.RLock()
"""Held around every parallel kernel: numba's workqueue layer aborts the process when two threads enter it, and two
kernels at once would only fight for the same cores."""

SIGNED_ZEROS_ASIDE = {"contract", "reassoc", "nsz"}
"""LLVM's freedom in loops that it vectorises: NaN and infinity stay what they are."""

_counter = np.zeros(1, np.int64)


@cache
def _sources_digest() -> str:
    """Changes with any source of this package: numba's cache looks at one file's time alone."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def compiled(
    function: FunctionType,
    name: str = "",
    bindings: Mapping[str, Any] | None = None,
    *,
    parallel: bool = False,
    fastmath: bool | set[str] = False,
) -> Callable[..., Any]:
    """A compiled copy of ``function``, cached on disk, in which the globals in ``bindings`` have their own values.

    numba finds a cached kernel by its name. Values in a closure would be part of the key too, but those
    of intrinsics differ from process to process.
    """
    copy = FunctionType(function.__code__, {**function.__globals__, **(bindings or {})}, function.__name__)
    copy.__defaults__, copy.__module__ = function.__defaults__, function.__module__
    copy.__qualname__ = f"{function.__name__}_{name}_{_sources_digest()}"
    return numba.njit(cache=True, nogil=True, parallel=parallel, fastmath=fastmath, error_model="numpy")(copy)


def serial(function: FunctionType) -> Callable[..., Any]:
    """Decorator of small kernels that run in the calling thread, and of what kernels call."""
    return compiled(function, fastmath=SIGNED_ZEROS_ASIDE)


def cgroup_cpus(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors that this process's control group and its parents (v1 and v2) grant, or None."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            if controllers:
                directory = (root / "cpu").joinpath(*parts[:depth])
                texts = [_text(directory / "cpu.cfs_quota_us"), _text(directory / "cpu.cfs_period_us")]
            else:
                texts = (_text(root.joinpath(*parts[:depth]) / "cpu.max").split() + ["", ""])[:2]
            if all(text.isdigit() for text in texts):
                quotas.append(int(texts[0]) / int(texts[1]))
    return min(quotas, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def num_threads() -> int:
    """Threads of a kernel: the processors this process may run on, at most its cgroup's quota rounded up."""
    threads = numba.config.NUMBA_NUM_THREADS
    if hasattr(os, "sched_getaffinity"):
        threads = min(threads, len(os.sched_getaffinity(0)))
    quota = cgroup_cpus()
    return max(1, threads if quota is None else min(threads, int(-(-quota // 1))))


@lru_cache(maxsize=1)
def _choose_threading_layer() -> None:
    """Prefer OpenMP, which is safe under threads: numba's own order begins with TBB, which is rarely installed."""
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    numba.set_num_threads(1)
    logger.debug("CPU kernels on %s threads (%s)", num_threads(), numba.threading_layer())


def run(kernel: Callable[..., Any], *arguments: Any) -> None:
    """Call a parallel kernel with ``arguments``, the address of a task counter at zero, and the number of threads."""
    with LOCK:
        numba.set_num_threads(num_threads())
        _counter[0] = 0
        kernel(*arguments, _counter.ctypes.data, num_threads())

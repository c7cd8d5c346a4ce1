"""Compilation of kernels, cached on disk."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
from numba.core import event

from ...progress import is_watched, report

VECTORISED = {"contract", "reassoc", "nsz"}
"""fastmath flags that let LLVM vectorise loops. NaN and infinity keep their meaning."""


class _CompilationListener(event.Listener):  # type: ignore[misc]
    """Reports that kernels are being compiled: the first use on a machine takes seconds, later ones load the cache."""

    def __init__(self) -> None:
        self._count = 0

    def on_start(self, event: Any) -> None:
        if is_watched():
            report(f"compiling CPU kernels for this machine, once: {self._count} done")

    def on_end(self, event: Any) -> None:
        self._count += 1


event.register("numba:compile", _CompilationListener())


@cache
def _sources_digest() -> str:
    """Hash all sources of this package: numba's cache only compares the time of one file."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def compiled(
    function: Any,
    name: str = "",
    bindings: Mapping[str, Any] | None = None,
    fastmath: bool | set[str] = False,
    *,
    inline: bool = False,
) -> Callable[..., Any]:
    """Compile a copy of ``function``, cached on disk, in which the globals named in ``bindings`` have other values.

    numba finds a cached kernel by its name. Values in a closure would be part of the key as well, but those
    of intrinsics differ between processes. Kernels run without the GIL.

    A function that other kernels call must be inlined in them. Otherwise each kernel brings a copy of it, optimised
    together with that kernel, and the linker takes the copy of the kernel that was loaded first for all of them: the
    order of sums would depend on the order of imports, and on whether the cache was empty.
    """
    copy = _bound(function, name, bindings or {})
    return numba.njit(cache=True, nogil=True, fastmath=fastmath, error_model="numpy", forceinline=inline)(copy)


def task(
    function: Any, name: str = "", bindings: Mapping[str, Any] | None = None, fastmath: bool | set[str] = False
) -> Any:
    """Compile a function of two int64 that other kernels call by its ``address``: an operation of a ``Program``."""
    copy = _bound(function, name, bindings or {})
    report("preparing CPU kernels; the first use on a machine compiles them")
    return numba.cfunc("void(int64, int64)", cache=True, fastmath=fastmath, error_model="numpy")(copy)


def _bound(function: Any, name: str, bindings: Mapping[str, Any]) -> FunctionType:
    copy = FunctionType(function.__code__, {**function.__globals__, **bindings}, function.__name__)
    copy.__defaults__, copy.__module__ = function.__defaults__, function.__module__
    copy.__qualname__ = f"{function.__name__}_{name}_{_sources_digest()}"
    return copy


def serial(function: Any) -> Callable[..., Any]:
    """Compile a small function that runs in the calling thread or is called by kernels. A decorator."""
    return compiled(function, fastmath=VECTORISED, inline=True)

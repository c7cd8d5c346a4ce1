"""Choice of the dispatchers' implementation, made on every call because MLX's default device can change."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from . import cpu

REFERENCE_SWITCH = "FLASH_MOE_REFERENCE"
"""Environment variable that makes every dispatcher run its plain-MLX reference if it is "1"."""

_forced = False


def backend() -> str:
    """Return the backend of MLX's default device: "metal", "cuda" or "cpu"."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def use_reference() -> bool:
    """Return whether the debug switch asks for the references."""
    return _forced or os.environ.get(REFERENCE_SWITCH, "") == "1"


@contextmanager
def references() -> Iterator[None]:
    """Run every dispatcher's reference within the context, on all threads. For comparisons; not while a model runs."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def use_kernels() -> bool:
    """Return whether the dispatchers run the GPU kernels: on a GPU, unless the debug switch is set."""
    return backend() != "cpu" and not use_reference()


def use_cpu_kernels() -> bool:
    """Return whether the dispatchers run the CPU kernels (``ops/cpu``): on the CPU, with numba, without the switch."""
    return backend() == "cpu" and not use_reference() and cpu.available()

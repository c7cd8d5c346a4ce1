"""Which implementation the dispatchers run: asked on every call, because MLX's default device can change."""

import os

import mlx.core as mx

from . import cpu

REFERENCE_SWITCH = "FLASH_MOE_REFERENCE"
"""Environment variable. "1" makes every dispatcher run its plain-MLX reference."""


def backend() -> str:
    """Name the backend of MLX's default device: "metal", "cuda" or "cpu"."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def use_reference() -> bool:
    """Tell whether the debug switch asks for the references."""
    return os.environ.get(REFERENCE_SWITCH, "") == "1"


def use_kernels() -> bool:
    """Tell whether the dispatchers run the GPU kernels: on a GPU, unless the debug switch is set."""
    return backend() != "cpu" and not use_reference()


def use_cpu_kernels() -> bool:
    """Tell whether the dispatchers run the CPU kernels (``ops/cpu``): on the CPU, with numba, without the switch."""
    return backend() == "cpu" and not use_reference() and cpu.available()

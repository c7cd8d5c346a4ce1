"""Reads kernels/*.metal and turns one source into an MLX kernel for Metal or for CUDA.

A kernel file is prose (its ``Inputs`` and ``Outputs`` lines name the arguments), ``#include`` lines, a
marker line, and the body. kernels/README.md describes the dialect that makes the body valid for both.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FlashMoEError

MIN_DEVICE_ELEMENTS = 8
"""MLX passes smaller inputs in Metal's constant address space; bodies take pointers into device memory only."""

BODY_MARKER = "// --- body ---"
DIALECTS = {"metal": "dialect_metal.h", "cuda": "dialect_cuda.h"}

_COMMENT = re.compile(r"//[^\n]*")
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
_NAMES = re.compile(r"^// (Inputs|Outputs) +(.+)$", re.MULTILINE)
_ADDRESS_SPACES = re.compile(r"\b(?:device|constant|threadgroup|thread)\b ?")


@dataclass(frozen=True)
class KernelSource:
    """One kernel file, read.

    Attributes:
        name: File name without its suffix.
        inputs: Names of the inputs, in the order of the signature.
        outputs: Names of the outputs.
        helpers: The included files' text, without comments.
        body: The kernel's body, without comments.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    helpers: str
    body: str


def kernel_folder() -> Traversable:
    """Find kernels/: inside the installed package, or at the top of a source tree.

    Raises:
        FlashMoEError: If neither has it.
    """
    packaged = resources.files("flash_moe_mlx") / "kernels"
    if (packaged / DIALECTS["metal"]).is_file():
        return packaged
    tree = Path(__file__).resolve().parents[3] / "kernels"
    if (tree / DIALECTS["metal"]).is_file():
        return tree
    raise FlashMoEError(
        f"[kernels] the kernel sources must be in {packaged} or {tree}, found neither. Reinstall flash-moe-mlx."
    )


def strip_comments(text: str) -> str:
    """Remove comments and empty lines: MLX hashes the source on every call, and searches it for names."""
    lines = (_COMMENT.sub("", line).rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def to_cuda(text: str) -> str:
    """Remove Metal's address spaces, which are parts of CUDA's own names and thus no macros."""
    return _ADDRESS_SPACES.sub("", text)


@cache
def read_text(name: str) -> str:
    """Text of a file in kernels/."""
    return (kernel_folder() / name).read_text(encoding="ascii")


@cache
def read_kernel(name: str) -> KernelSource:
    """Read kernels/NAME.metal.

    Raises:
        FlashMoEError: If the file lacks its marker, or the lines that name its arguments.
    """
    prose, marker, body = read_text(f"{name}.metal").partition(BODY_MARKER + "\n")
    names = {kind: tuple(listed.split(", ")) for kind, listed in _NAMES.findall(prose)}
    if not marker or set(names) != {"Inputs", "Outputs"}:
        raise FlashMoEError(
            f"[kernels] {name}.metal must have the line {BODY_MARKER!r} and lines naming its inputs and outputs. "
            "Reinstall flash-moe-mlx."
        )
    helpers = "".join(read_text(file) for file in _INCLUDE.findall(prose))
    return KernelSource(name, names["Inputs"], names["Outputs"], strip_comments(helpers), strip_comments(body))


def generate(name: str, backend: str) -> tuple[str, str]:
    """Header and body of a kernel as MLX gets them.

    Args:
        name: File name in kernels/, without suffix.
        backend: "metal" or "cuda".
    """
    kernel = read_kernel(name)
    dialect = strip_comments(read_text(DIALECTS[backend]))
    if backend == "cuda":
        return dialect + to_cuda(kernel.helpers), to_cuda(kernel.body)
    return dialect + kernel.helpers, kernel.body


@cache
def mlx_kernel(name: str, backend: str) -> Callable[..., list[mx.array]]:
    """The MLX kernel object of kernels/NAME.metal, made once a process."""
    kernel = read_kernel(name)
    header, body = generate(name, backend)
    make = mx.fast.cuda_kernel if backend == "cuda" else mx.fast.metal_kernel
    made: Callable[..., list[mx.array]] = make(
        name=f"flash_moe_{name}",
        input_names=kernel.inputs,
        output_names=kernel.outputs,
        source=body,
        header=header,
    )
    return made


def launch(
    name: str,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    template: Sequence[tuple[str, Any]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    init_value: float | None = None,
) -> list[mx.array]:
    """Run a kernel on the default GPU.

    Args:
        name: File name in kernels/, without suffix.
        inputs: Arrays in the order of the kernel's ``Inputs`` line.
        outputs: (shape, dtype) in the order of its ``Outputs`` line.
        template: Compile-time constants and types of the body.
        grid: Threads in all, a multiple of the threadgroup wherever the body has barriers.
        threadgroup: Threads a threadgroup.
        init_value: What the outputs hold before; tests poison them with NaN.
    """
    backend = "metal" if mx.metal.is_available() else "cuda"
    return mlx_kernel(name, backend)(
        inputs=list(inputs),
        template=list(template),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        init_value=init_value,
    )

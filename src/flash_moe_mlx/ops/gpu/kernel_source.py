"""Reads kernels/*.metal and turns one source into an MLX kernel for Metal or for CUDA.

A kernel file is prose (its ``Inputs`` and ``Outputs`` lines name the arguments), ``#include`` lines, a
marker line, and the body. kernels/README.md describes the dialect that makes the body valid for both.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import mlx.core as mx

from ...errors import FlashMoEError
from ...machine import cache_folder
from ..allocation import explain_no_memory
from ..backend import REFERENCE_SWITCH
from . import cuda_modules

_REFUSALS = ("Unable to build metal library", "Failed to compile", "Thread group size")
"""Phrases in MLX's errors if a kernel can't be compiled or launched."""

MIN_DEVICE_ELEMENTS = 8
"""Minimum size of an input. MLX passes smaller ones in Metal's constant address space; bodies take device pointers."""

BODY_MARKER = "// --- body ---"
DIALECTS = {"metal": "dialect_metal.h", "cuda": "dialect_cuda.h"}

TYPE_NAMES = {mx.float32: "float", mx.bfloat16: "bfloat16_t", mx.float16: "float16_t", mx.uint32: "uint32_t"}
"""Names of MLX's dtypes in the dialects."""

Constants = tuple[tuple[str, int | bool | float | mx.Dtype], ...]

_COMMENT = re.compile(r"//[^\n]*")
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
_NAMES = re.compile(r"^// (Inputs|Outputs) +(.+)$", re.MULTILINE)
_ADDRESS_SPACES = re.compile(r"\b(?:device|constant|threadgroup|thread)\b ?")


@dataclass(frozen=True)
class KernelSource:
    """The contents of one kernel file.

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
    tree = Path(__file__).resolve().parents[4] / "kernels"
    if (tree / DIALECTS["metal"]).is_file():
        return tree
    raise FlashMoEError(
        f"[kernels] the kernel sources must be in {packaged} or {tree}, found neither. Reinstall flash-moe-mlx."
    )


def strip_comments(text: str) -> str:
    """Remove comments and empty lines, because MLX hashes the source on every call and searches it for names."""
    lines = (_COMMENT.sub("", line).rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def to_cuda(text: str) -> str:
    """Remove Metal's address spaces. They can't be macros, because they are parts of CUDA's own names."""
    return _ADDRESS_SPACES.sub("", text)


@cache
def read_text(name: str) -> str:
    """Return the text of a file in kernels/."""
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
    """Return the header and body of a kernel for MLX.

    Args:
        name: File name in kernels/, without suffix.
        backend: "metal" or "cuda".
    """
    kernel = read_kernel(name)
    dialect = strip_comments(read_text(DIALECTS[backend]))
    if backend == "cuda":
        return dialect + to_cuda(kernel.helpers), to_cuda(kernel.body)
    return dialect + kernel.helpers, kernel.body


def cuda_folder() -> Path:
    """Return the folder of the files that CUDA kernels include. MLX caches compiled kernels by the including text."""
    return cache_folder() / "cuda"


def include(text: str, folder: Path) -> str:
    """Put text into a file named by its own hash; return the line that includes it, or the text if that fails."""
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.cuh"
    try:
        if not (path.is_file() and path.read_text(encoding="ascii") == text):
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=folder, encoding="ascii", delete=False) as file:
                file.write(text)
            Path(file.name).replace(path)  # atomic: another process may write the same file
    except OSError:
        return text
    return f'#include "{path}"\n'


def declare(constants: Constants) -> str:
    """Return the declarations of the constants, which precede the body, in every dialect."""
    lines = []
    for name, value in constants:
        if isinstance(value, mx.Dtype):
            lines.append(f"typedef {TYPE_NAMES[value]} {name};")
        elif isinstance(value, float):
            lines.append(f"constexpr float {name} = {value!r}f;")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {kind} {name} = {str(value).lower()};")
    return "".join(line + "\n" for line in lines)


@dataclass(eq=False)
class Kernel:
    """A kernel file with its constants, created once per shape and compiled before its first launch.

    The constants are declarations before the body instead of template arguments, which MLX converts to strings on
    every call: that took 3 of the 5 microseconds of building a call with 27 of them.

    Attributes:
        name: File name in kernels/, without suffix.
        constants: Compile-time constants and types of the body.
        threadgroup: Threads per threadgroup.
        run: MLX's function that launches it; None before the first launch.
    """

    name: str
    constants: Constants
    threadgroup: tuple[int, int, int]
    run: Callable[..., list[mx.array]] | None = field(default=None, init=False)

    @cached_property
    def label(self) -> str:
        """Name of the compiled function. It depends on the constants, because MLX caches kernels by name."""
        digest = hashlib.sha256(declare(self.constants).encode()).hexdigest()
        return f"flash_moe_{self.name}_{digest[:12]}"

    @cached_property
    def metal(self) -> Callable[..., list[mx.array]]:
        """MLX's Metal kernel."""
        header, body = generate(self.name, "metal")
        return self._make(mx.fast.metal_kernel, header, declare(self.constants) + body)

    @cached_property
    def cuda(self) -> Callable[..., list[mx.array]]:
        """MLX's CUDA kernel."""
        header, source = self.cuda_text
        return self._make(mx.fast.cuda_kernel, header, source)

    @cached_property
    def cuda_text(self) -> tuple[str, str]:
        """Header and source for MLX's CUDA kernel, which only include the files that hold the kernel.

        MLX's CUDA backend hashes the whole text on every launch, which took 2.8 of the host's 9 microseconds per launch
        with 12,000 characters.
        """
        header, body = generate(self.name, "cuda")
        shapes = [f"{name}_shape" for name in read_kernel(self.name).inputs if f"{name}_shape" in body]
        source = include(declare(self.constants) + body, cuda_folder())
        modules = cuda_modules.modules()
        mark = "" if modules is None else f"// {modules.architecture}\n"
        # MLX looks for the shapes' names.
        return mark + include(header, cuda_folder()), f"// {' '.join(shapes)}\n{source}"

    def make(
        self, inputs: Sequence[mx.array], outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]]
    ) -> Callable[..., list[mx.array]]:
        """Return MLX's function that launches the kernel, and keep it in `run`.

        On CUDA the kernel is compiled for these arguments, unless the machine has it. MLX compiles it for others.

        Args:
            inputs: Arrays of the first launch.
            outputs: (shape, dtype) of its outputs.
        """
        if mx.metal.is_available():
            self.run = self.metal
            return self.run
        modules = cuda_modules.modules()
        if modules is not None:
            modules.provide(self.label, self.mlx_text(inputs, outputs))
        self.run = self.cuda
        return self.run

    def mlx_text(self, inputs: Sequence[mx.array], outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]]) -> str:
        """Return the text that MLX compiles for CUDA, without its own headers.

        Args:
            inputs: Arrays of a launch.
            outputs: (shape, dtype) of its outputs.
        """
        kernel = read_kernel(self.name)
        header, source = self.cuda_text
        arguments = zip(kernel.inputs, inputs, strict=True)
        return cuda_modules.mlx_text(
            self.label,
            header,
            source,
            [(name, array.dtype, array.ndim > 0 and f"{name}_shape" in source) for name, array in arguments],
            [(name, dtype, False) for name, (_, dtype) in zip(kernel.outputs, outputs, strict=True)],
        )

    def _make(self, make: Callable[..., Any], header: str, source: str) -> Callable[..., list[mx.array]]:
        kernel = read_kernel(self.name)
        made: Callable[..., list[mx.array]] = make(
            name=self.label, input_names=kernel.inputs, output_names=kernel.outputs, source=source, header=header
        )
        return made


@contextmanager
def explain_refusals(kernel: str = "every kernel") -> Iterator[None]:
    """Raise a typed error if the GPU's compiler refuses a kernel. A context manager and a decorator.

    Args:
        kernel: Name of the kernel, if only one is evaluated.

    Raises:
        MemoryLimitError: If there is no memory left.
        FlashMoEError: With the compiler's message and the switch that runs without kernels.
    """
    try:
        with explain_no_memory():
            yield
    except RuntimeError as error:
        message = str(error).strip()
        if not any(refusal in message for refusal in _REFUSALS):
            raise
        raise FlashMoEError(
            f"[kernels] {kernel} must compile on this GPU, got: {message}\nSet {REFERENCE_SWITCH}=1 to run without "
            'kernels, and report what "flash-moe doctor --json" says.'
        ) from error


@contextmanager
def launched_at_once() -> Iterator[None]:
    """Evaluate every launch of this thread immediately, so that an error names its kernel. A context manager."""
    _thread.at_once = True
    try:
        yield
    finally:
        _thread.at_once = False


_thread = threading.local()


def launch(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, int, int],
    init_value: float | None = None,
) -> list[mx.array]:
    """Run a kernel on the default GPU.

    Args:
        kernel: File and constants.
        inputs: Arrays in the order of the file's ``Inputs`` line.
        outputs: (shape, dtype) in the order of its ``Outputs`` line.
        grid: Total number of threads, a multiple of the threadgroup.
        init_value: Initial value of the outputs; tests poison them with NaN.
    """
    if not getattr(_thread, "at_once", False):
        return _run(kernel, inputs, outputs, grid, init_value)
    with explain_refusals(f"the kernel {kernel.name}"):
        results = _run(kernel, inputs, outputs, grid, init_value)
        mx.eval(results)
    return results


def _run(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, int, int],
    init_value: float | None,
) -> list[mx.array]:
    run = kernel.run or kernel.make(inputs, outputs)
    return run(
        inputs=inputs,
        grid=grid,
        threadgroup=kernel.threadgroup,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        init_value=init_value,
    )

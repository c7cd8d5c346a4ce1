"""Compilation of CUDA kernels with NVRTC, once per machine, into the folder from which MLX loads compiled modules.

MLX compiles a kernel behind its own headers, which take NVRTC 1.4 s however short the kernel is. It looks for every
kernel in its folder of compiled modules, but stores no custom one, so every process compiles them again. The files
in kernels/ need two of CUDA's headers: NVRTC compiles them here in a twentieth of the time, and MLX finds the result.
Where something is missing, or MLX expects another text than `mlx_text`, it compiles as ever.
"""

import ctypes
import logging
import os
import tempfile
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from .cuda_runtime import is_available
from .nvrtc import NvrtcCompiler

logger = logging.getLogger(__name__)

TYPES = {
    mx.bool_: "bool", mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t",
    mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float",
}  # fmt: skip
"""MLX's names of its dtypes in CUDA."""

MLX_HEADERS = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
"""The beginning of each custom kernel that MLX compiles."""

OWN_HEADERS = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
namespace mlx::core::cu {
struct Shape {
  int sizes[10];
  __device__ int operator[](int axis) const { return sizes[axis]; }
};
}
"""
"""All that the files in kernels/ need of it. MLX passes a shape as its ten first sizes."""


class Compiler(Protocol):
    """A compiler of CUDA for one architecture."""

    @property
    def architecture(self) -> str:
        """The architecture, such as "sm_90a"."""
        ...

    def compile(self, text: str) -> tuple[bytes, str]:
        """Compile a text that defines one function. Return the binary, and the function's mangled name.

        Raises:
            RuntimeError: With the compiler's message.
        """
        ...


Argument = tuple[str, mx.Dtype, bool]
"""Name and dtype of an argument, and whether the body reads its shape."""


def mlx_text(label: str, header: str, body: str, inputs: Iterable[Argument], outputs: Iterable[Argument]) -> str:
    """Return what follows its own headers in the text that MLX compiles. MLX stores modules by a hash of the text.

    Args:
        label: The kernel's name, as given to `mlx.core.fast.cuda_kernel`.
        header: Its ``header``.
        body: Its ``source``.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
    """
    declared = []
    for name, dtype, with_shape in inputs:
        declared.append(f"    const {TYPES[dtype]}* {name}")
        if with_shape:
            declared.append(f"    const __grid_constant__ Shape {name}_shape")
    declared.extend(f"    {TYPES[dtype]}* {name}" for name, dtype, _ in outputs)
    return (
        f"{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n__global__ void "
        f"{function_name(label)}(\n" + ",\n".join(declared) + f") {{\n{body}\n}}\n\n}} // namespace mlx::core::cu\n"
    )


def own_text(text: str) -> str:
    """Return the text that defines the same function as a `mlx_text`, complete, and with headers that compile fast."""
    return OWN_HEADERS + text.replace("namespace cg = cooperative_groups;\n", "")


def function_name(label: str) -> str:
    """Return MLX's name for the function of a custom kernel."""
    return f"custom_kernel_{label}"


def module_name(label: str, text: str) -> str:
    """Return the name under which MLX looks for a compiled kernel.

    Args:
        label: The kernel's name.
        text: The whole text that MLX would compile.
    """
    return f"{function_name(label)}_{_standard_hash(text.encode()):x}"


def _standard_hash(text: bytes) -> int:
    """Return ``std::hash<std::string>`` of libstdc++, with which MLX is built on Linux."""
    function = ctypes.CDLL("libstdc++.so.6")["_ZSt11_Hash_bytesPKvmm"]
    function.restype, function.argtypes = ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t)
    return int(function(text, len(text), 0xC70F6907))


def modules_folder() -> Path:
    """Return the folder of MLX's compiled modules."""
    folder = os.environ.get("MLX_PTX_CACHE_DIR")
    return Path(folder) if folder else Path(tempfile.gettempdir()) / "mlx" / mx.__version__ / "ptx"


class Modules:
    """Compiled kernels, stored where MLX looks for them.

    Attributes:
        folder: MLX's folder of compiled modules.
        architecture: The GPU's, as the compiler names it. Part of each text, because binaries run on one architecture.
        compiled: Number of kernels compiled by this process.
    """

    def __init__(self, folder: Path, compiler: Compiler):
        """Store modules in a folder.

        Args:
            folder: MLX's folder of compiled modules.
            compiler: Compiles what isn't there.
        """
        self.folder, self.architecture, self.compiled = folder, compiler.architecture, 0
        self._compiler = compiler
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def provide(self, label: str, text: str) -> None:
        """Compile a kernel unless it is stored. Where that fails, MLX compiles it, and reports what is wrong.

        Args:
            label: The kernel's name.
            text: Its `mlx_text`.
        """
        with self._lock:
            if label in self._seen:
                return
            self._seen.add(label)
            name = module_name(label, MLX_HEADERS + text)
            if (self.folder / f"{name}.ptx").exists():
                return
            try:
                binary, mangled = self._compiler.compile(
                    OWN_HEADERS + text.replace("namespace cg = cooperative_groups;\n", "")
                )
                # MLX reads both files once the binary is there, so the binary comes last.
                self._write(f"{name}.txt", f"mlx::core::cu::{function_name(label)}\t{mangled}\n".encode())
                self._write(f"{name}.ptx", binary)
            except (RuntimeError, OSError) as error:
                logger.info("MLX compiles the kernel %s itself: %s", label, error)
                return
            self.compiled += 1

    def _write(self, name: str, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            file.write(content)
        Path(file.name).replace(self.folder / name)  # atomic: another process may write the same file


@cache
def modules() -> Modules | None:
    """Return the modules of this machine's first GPU, or None without cuda-bindings, NVRTC or CUDA's headers."""
    if not is_available():
        return None
    try:
        return Modules(modules_folder(), NvrtcCompiler())
    except (ImportError, RuntimeError, OSError) as error:
        logger.info("MLX compiles its kernels itself: %s", error)
        return None


def explain_compilation() -> str:
    """Return when kernels are compiled on this machine's CUDA GPU, for a person."""
    known = modules()
    if known is None:
        return "every process compiles its kernels, for 20 seconds or more: NVRTC or CUDA's headers can't be used"
    stored = len(list(known.folder.glob(f"{function_name('flash_moe_')}*.ptx")))
    return f"{stored} kernels stored in {known.folder}; the first run of a model adds those of its shapes, in seconds"

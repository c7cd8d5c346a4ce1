"""NVIDIA's run-time compiler, by way of cuda-bindings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx


class NvrtcCompiler:
    """NVRTC for one GPU.

    Attributes:
        architecture: The GPU's, as NVRTC names it, such as "sm_90a".
        log: The compiler's messages at the last compilation.
    """

    def __init__(self, architecture: str | None = None, options: Sequence[str] = ()):
        """Find NVRTC and CUDA's headers.

        Args:
            architecture: Target; None for the first GPU's.
            options: More options for NVRTC.

        Raises:
            ImportError: If cuda-bindings isn't installed.
            RuntimeError: If NVRTC can't be loaded, or the driver has no GPU.
            FileNotFoundError: If CUDA's headers aren't installed.
        """
        from cuda.bindings import nvrtc

        self._nvrtc: Any = nvrtc
        self._call("nvrtcVersion")
        self.architecture, self.log = architecture or _architecture(), ""
        target = f"--gpu-architecture={self.architecture}"
        flags = ("--device-as-default-execution-space", target, f"--include-path={_headers()}", *options)
        self._options = [flag.encode() for flag in flags]

    def compile(self, text: str) -> tuple[bytes, str]:
        """Compile a text that defines one ``__global__`` function of the namespace mlx::core::cu.

        Returns:
            The binary, and the function's mangled name.

        Raises:
            RuntimeError: With the compiler's message.
        """
        function = text.partition("__global__ void ")[2].partition("(")[0]
        expression = f"mlx::core::cu::{function}".encode()
        program = self._call("nvrtcCreateProgram", text.encode(), f"{function}.cu".encode(), 0, [], [])
        try:
            self._call("nvrtcAddNameExpression", program, expression)
            (failure,) = self._nvrtc.nvrtcCompileProgram(program, len(self._options), self._options)
            log = self._buffer("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
            self.log = log.decode(errors="replace").rstrip("\0")
            if failure != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise RuntimeError(f"NVRTC refuses {function}: {self.log}")
            mangled = self._call("nvrtcGetLoweredName", program, expression)
            return self._buffer("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program), mangled.decode()
        finally:
            self._call("nvrtcDestroyProgram", program)

    def _buffer(self, size: str, read: str, program: Any) -> bytes:
        buffer = bytes(self._call(size, program))  # cuda-bindings writes into it
        self._call(read, program, buffer)
        return buffer

    def _call(self, name: str, *arguments: Any) -> Any:
        failure, *results = getattr(self._nvrtc, name)(*arguments)
        if failure != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{name} must succeed, got {failure.name}")
        return results[0] if len(results) == 1 else results


def _architecture() -> str:
    """Return the architecture for which MLX compiles: the first GPU's, with the features of that one alone."""
    from cuda.bindings import runtime

    kinds = runtime.cudaDeviceAttr
    versions = []
    for kind in (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor):
        failure, version = runtime.cudaDeviceGetAttribute(kind, 0)
        if failure != runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"cudaDeviceGetAttribute must succeed, got {failure.name}")
        versions.append(version)
    return f"sm_{versions[0]}{versions[1]}" + ("a" if versions[0] >= 9 else "")


def _headers() -> Path:
    """Return the folder of CUDA's headers: those that were installed with MLX, or others of the machine."""
    from cuda.pathfinder import find_nvidia_header_directory

    nvidia = Path(mx.__file__).parents[1] / "nvidia"
    found = find_nvidia_header_directory("cudart")
    for folder in (nvidia / "cu13" / "include", nvidia / "cuda_runtime" / "include", *([Path(found)] if found else [])):
        if (folder / "cuda_bf16.h").is_file():
            return folder
    raise FileNotFoundError("CUDA's headers are not installed")

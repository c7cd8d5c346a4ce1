"""CUDA runtime calls that slot memory needs, by way of cuda-bindings: pinned memory, streams and copies between them.

`CudaRuntime` is all that the rest of the library knows of CUDA; tests put another in its place.
"""

from importlib.util import find_spec
from typing import Any, Protocol

from ...errors import MemoryLimitError, StoreError


class CudaRuntime(Protocol):
    """Pinned host memory, memory of the GPU, and copies between them in the order of a stream."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin mapped, read-only host memory, so that copies from it need no other copy before.

        Raises:
            MemoryLimitError: If the system has no memory for all of its pages.
            StoreError: If the system refuses.
        """
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        ...

    def allocate_pinned(self, nbytes: int) -> int:
        """Return the address of pinned, page-aligned host memory.

        Raises:
            MemoryLimitError: If there is none left.
        """
        ...

    def free_pinned(self, address: int) -> None:
        """Free what `allocate_pinned` returned."""
        ...

    def keep_on_device(self, address: int, nbytes: int) -> None:
        """Have the pages of managed memory stay on the GPU."""
        ...

    def stream(self) -> Any:
        """Return a new stream that waits for no other stream."""
        ...

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Start a copy after those that the stream has been given before. Any thread may call this."""
        ...

    def synchronize(self, stream: Any) -> None:
        """Wait until a stream has done all that it was given."""
        ...

    def close(self, stream: Any) -> None:
        """Destroy a stream."""
        ...


def is_available() -> bool:
    """Tell whether cuda-bindings is installed."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


class BoundRuntime:
    """CudaRuntime of one GPU, over cuda-bindings."""

    def __init__(self, device: int = 0):
        """Bind the GPU of this number.

        Raises:
            StoreError: If the driver refuses it.
        """
        from cuda.bindings import runtime

        self._runtime: Any = runtime
        self._device = device
        self._call("cudaSetDevice", device)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._runtime, name)(*arguments)
        codes = self._runtime.cudaError_t
        if error == codes.cudaSuccess:
            return results[0] if results else None
        if error == codes.cudaErrorMemoryAllocation:
            raise MemoryLimitError(
                f"[cuda] {name} must find memory, got {error.name}. Lower memory_limit or gpu_memory_limit, or end "
                "other programs."
            )
        raise StoreError(f"[cuda] {name} must succeed, got {error.name}. See the driver's log, and try again.")

    def register(self, address: int, nbytes: int) -> None:
        """Pin mapped, read-only host memory."""
        flags = self._runtime.cudaHostRegisterReadOnly | self._runtime.cudaHostRegisterMapped
        try:
            self._call("cudaHostRegister", address, nbytes, flags)
        except (MemoryLimitError, StoreError) as error:
            raise type(error)(f'{error} Or load with io="pread", which pins a few buffers only.') from error

    def unregister(self, address: int) -> None:
        """Undo `register`."""
        self._call("cudaHostUnregister", address)

    def allocate_pinned(self, nbytes: int) -> int:
        """Return the address of pinned, page-aligned host memory."""
        return int(self._call("cudaHostAlloc", nbytes, self._runtime.cudaHostAllocDefault))

    def free_pinned(self, address: int) -> None:
        """Free what `allocate_pinned` returned."""
        self._call("cudaFreeHost", address)

    def keep_on_device(self, address: int, nbytes: int) -> None:
        """Have the pages of managed memory stay on the GPU."""
        advice = self._runtime.cudaMemoryAdvise.cudaMemAdviseSetPreferredLocation
        place = self._runtime.cudaMemLocation()
        place.type = self._runtime.cudaMemLocationType.cudaMemLocationTypeDevice
        place.id = self._device
        # CUDA 12 has this call under another name; CUDA 13 gave it the first one's.
        name = "cudaMemAdvise_v2" if hasattr(self._runtime, "cudaMemAdvise_v2") else "cudaMemAdvise"
        self._call(name, address, nbytes, advice, place)

    def stream(self) -> Any:
        """Return a new stream that waits for no other stream."""
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Start a copy after those that the stream has been given before."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        (error,) = self._runtime.cudaMemcpyAsync(target, source, nbytes, kind, stream)
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise StoreError(f"[cuda] cudaMemcpyAsync must succeed, got {error.name}. See the driver's log.")

    def synchronize(self, stream: Any) -> None:
        """Wait until a stream has done all that it was given."""
        self._call("cudaStreamSynchronize", stream)

    def close(self, stream: Any) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

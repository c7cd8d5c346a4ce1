"""Turns exceptions of allocations that fail into typed errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import MemoryLimitError

_NO_MEMORY = ("out of memory", "Unable to allocate", "maximum allowed buffer size")
"""Phrases in MLX's errors if there is no memory left."""


@contextmanager
def explain_no_memory() -> Iterator[None]:
    """Raise a typed error if an allocation fails. A context manager and a decorator.

    Raises:
        MemoryLimitError: If there is no memory left, on a GPU or in the process.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = str(error).strip() or type(error).__name__
        if isinstance(error, RuntimeError) and not any(sign in message for sign in _NO_MEMORY):
            raise
        raise MemoryLimitError(
            f"[gpu memory] the GPU, or the process, must have room for all that the limit allows, got: {message}\n"
            "Lower gpu_memory_limit (memory_limit if the GPU has no memory of its own), or end other programs."
        ) from error

"""Shared code of the mixers: blocks of a long prompt, units of byte counts, and the protocol of a CPU decode step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ...errors import RequestError
from ...ops.backend import backend

if TYPE_CHECKING:
    from ...ops.cpu.program import Operation

CPU_BLOCK, GPU_BLOCK = 256, 1024


def mixer_block() -> int:
    """Return the number of tokens that a mixer processes at a time.

    It is a constant of the backend: it bounds the scratch memory of a long prompt (attention scores, projections)
    without making bits depend on the memory limit, and a GPU needs more tokens than a CPU to be busy.
    """
    return CPU_BLOCK if backend() == "cpu" else GPU_BLOCK


FLOAT32_BYTES = 4

KV_STEP = 256
"""Number of tokens by which mlx_lm's KVCache grows."""


class TokenMixer(Protocol):
    """One token of a mixer as operations of a CPU program, built once per layer.

    Attributes:
        operations: Operations from the normalised hidden state to the mixer's output.
    """

    operations: "list[Operation]"

    def set(self, arrays: Sequence[mx.array], position: int) -> None:
        """Point the operations at the arrays of a sequence's cache.

        Args:
            arrays: The cache's arrays, with room for one more token.
            position: Number of tokens before this one.

        Raises:
            RequestError: If the arrays do not belong to a cache of this mixer.
        """
        ...


def other_cache(arrays: Sequence[mx.array]) -> RequestError:
    """Return the error for a cache of another model or of several sequences."""
    shapes = ", ".join(str(array.shape) for array in arrays)
    return RequestError(
        f"[cache] must be of this model and of one sequence, got arrays of shapes {shapes}. Make it with the model's "
        "make_cache()."
    )


def mix(mixer: nn.Module, norm: nn.Module, x: mx.array, cache: Any) -> mx.array:
    """Compute ``x + mixer(norm(x))`` over (B, L, H), `mixer_block` tokens at a time."""
    length, size = x.shape[1], mixer_block()
    if length <= size:
        return x + mixer(norm(x), cache)
    blocks = []
    for start in range(0, length, size):
        block = x[:, start : start + size]
        blocks.append(block + mixer(norm(block), cache))
        mx.eval(blocks[-1])
    return mx.concatenate(blocks, axis=1)

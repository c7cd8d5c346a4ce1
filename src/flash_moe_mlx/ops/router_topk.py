"""Experts, weights and slots from a router's logits, without the host."""

from functools import cache

import mlx.core as mx

from .backend import use_kernels
from .gpu import kernel_source
from .gpu.kernel_source import Kernel

MAX_EXPERTS_PER_TOKEN = 32
SIMD_GROUPS = 8


def router_topk_reference(
    logits: mx.array, num_experts: int, k: int, normalise: bool, slot_table: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute ``router_topk`` in plain MLX operations."""
    probabilities = mx.softmax(logits[:, :num_experts].astype(mx.float32), axis=-1, precise=True)
    ids = mx.argsort(probabilities, axis=-1)[:, : -k - 1 : -1].astype(mx.uint32)
    weights = mx.take_along_axis(probabilities, ids, axis=-1)
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights, ids if slot_table is None else slot_table[ids]


@cache
def topk_kernel(num_experts: int, pitch: int, k: int, normalise: bool, has_table: bool) -> Kernel:
    """Return kernels/router_topk.metal for one layer's router."""
    constants = (
        ("E", num_experts),
        ("PITCH", pitch),
        ("K", k),
        ("NORMALISE", normalise),
        ("HAS_TABLE", has_table),
        ("SIMD_GROUPS", SIMD_GROUPS),
    )
    return Kernel("router_topk", constants, (32, SIMD_GROUPS, 1))


def router_topk_kernel(
    logits: mx.array, num_experts: int, k: int, normalise: bool, slot_table: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute ``router_topk`` on the GPU, in one launch. Kernel: kernels/router_topk.metal."""
    tokens, pitch = logits.shape
    ids, weights, slots = kernel_source.launch(
        topk_kernel(num_experts, pitch, k, normalise, slot_table is not None),
        [logits, logits.view(mx.uint32) if slot_table is None else slot_table],
        [((tokens, k), mx.uint32), ((tokens, k), mx.float32), ((tokens, k), mx.uint32)],
        (32 * tokens, SIMD_GROUPS, 1),
    )
    return ids, weights, slots


def router_topk(
    logits: mx.array, num_experts: int, k: int, normalise: bool, slot_table: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """Choose each token's experts: softmax over all, then the K most probable, most probable first.

    Among equally probable experts, those of higher index are chosen, and come first. Logits that are NaN or infinite
    give weights that are not finite, and ids that are valid.

    Args:
        logits: The router's logits, float32, in the first E columns. Shape (T, E or more).
        num_experts: Number of experts, E.
        k: Number of experts per token, at most 32.
        normalise: Whether to divide the K weights by their sum.
        slot_table: Slot of each expert of the layer, uint32, shape (E,); an entry beyond the layer's slots marks an
            expert that is not in memory. None returns ids instead of slots.

    Returns:
        Ids (T, K) uint32, weights (T, K) float32, and slots (T, K) uint32, which are the table's entries unchanged.
    """
    run = router_topk_kernel if use_kernels() and k <= MAX_EXPERTS_PER_TOKEN else router_topk_reference
    return run(logits, num_experts, k, normalise, slot_table)

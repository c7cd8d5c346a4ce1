"""A whole routed layer whose experts are all in their slots: two launches on a GPU."""

from dataclasses import replace

import mlx.core as mx

from .backend import use_kernels
from .expert_ffn import (
    WORD_BYTES,
    ExpertPlan,
    expert_ffn,
    expert_ffn_reference,
    gate_up,
    is_quantized,
    plan_of,
    projection_constants,
)
from .gpu import kernel_source
from .gpu.geometry import SIMD_WIDTH, Geometry, choose_geometry
from .gpu.kernel_source import Kernel
from .moe_combine import moe_combine, moe_combine_reference
from .slot_memory import ExpertBank

MAX_WIDTH = 2048
"""Widest expert of which two rows of h fit into threadgroup memory."""

MAX_BYTES = 16 << 20
"""Bytes of a call's experts above which three launches beat two. On an H100 two took 16 against 20 us at 7 MB, as long
at 14 MB, and longer from 28 MB on: a token's experts run one after the other in them."""

SIMD_GROUPS = 4
MIN_SIMD_GROUPS = 2048
"""SIMD groups in all below which a lane takes one row, not two: a token's experts run one after the other, so the
rows alone must fill the GPU. Reasoned for the 132 processors of an H100, and not yet tuned there."""


def combine_kernel(
    plan: ExpertPlan, dtype: mx.Dtype, shared: bool, gate: bool, residual: bool, spread: Geometry | None = None
) -> tuple[Kernel, Geometry]:
    """kernels/expert_down_combine.metal for a layout, and its spread; what is absent is compiled out.

    The spread is that of expert_down but for rows and SIMD groups, so the bits are its bits. ``spread`` replaces
    the plan's own from then on.
    """
    key = (dtype, shared, gate, residual)
    if key not in plan.combined or spread is not None:
        layout = plan.layout
        quantization = layout.quantization("down_proj")
        assert quantization is not None
        pair = (quantization.bits, quantization.group_size)
        geometry = spread or choose_geometry(
            "expert_ffn_combine", layout.intermediate_size, [pair], rows=2, simd_groups=SIMD_GROUPS
        )
        if spread is None and layout.hidden_size * geometry.lanes // (SIMD_WIDTH * 2) < MIN_SIMD_GROUPS:
            geometry = replace(geometry, rows=1)
        constants = (
            ("OUT", dtype),
            ("H", layout.hidden_size),
            ("I", layout.intermediate_size),
            ("RECORD", layout.record_bytes // WORD_BYTES),
            ("HAS_SHARED", shared),
            ("HAS_GATE", shared and gate),
            ("HAS_RESIDUAL", residual),
            *projection_constants(layout, "down_proj", layout.intermediate_size),
            *geometry.constants,
        )
        plan.combined[key] = (Kernel("expert_down_combine", constants, geometry.threadgroup), geometry)
    return plan.combined[key]


def expert_ffn_combine_reference(
    x: mx.array,
    bank: ExpertBank,
    slots: mx.array,
    weights: mx.array,
    shared: mx.array | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    """``expert_ffn_combine`` in plain MLX operations."""
    return moe_combine_reference(expert_ffn_reference(x, bank, slots), weights, shared, shared_gate, residual)


def expert_ffn_combine_kernel(
    x: mx.array,
    bank: ExpertBank,
    slots: mx.array,
    weights: mx.array,
    shared: mx.array | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
    plan: ExpertPlan | None = None,
) -> mx.array:
    """``expert_ffn_combine`` on the GPU, for quantised records of experts at most MAX_WIDTH wide.

    Kernels: kernels/expert_gate_up.metal, kernels/expert_down_combine.metal. ``plan``: constants, made from the
    layout and remembered where it is None.
    """
    plan = plan or plan_of(bank.layout)
    h = gate_up(x, bank, slots, plan)
    dtype = combined_dtype(shared, residual)
    kernel, geometry = combine_kernel(plan, dtype, shared is not None, shared_gate is not None, residual is not None)
    # The kernel has all inputs; any array stands in for one that is absent.
    extra = [weights if array is None else array for array in (shared, shared_gate, residual)]
    (out,) = kernel_source.launch(
        kernel,
        [h, bank.array, slots.astype(mx.uint32), weights, *extra],
        [(x.shape, dtype)],
        geometry.grid(x.shape[0], bank.layout.hidden_size),
    )
    return out


def combined_dtype(shared: mx.array | None, residual: mx.array | None) -> mx.Dtype:
    """dtype of the residual, else of the shared expert, else float32: as ``moe_combine``."""
    for array in (residual, shared):
        if array is not None:
            return array.dtype
    return mx.float32


def expert_ffn_combine(
    x: mx.array,
    bank: ExpertBank,
    slots: mx.array,
    weights: mx.array,
    shared: mx.array | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    """``moe_combine(expert_ffn(x, bank, slots), ...)`` in one call, and with the same bits.

    For a layer all of whose experts are in their slots at once. On a GPU, small calls are two launches, not three,
    and the per-expert outputs never leave the registers.

    Args:
        x: As for ``expert_ffn``, like the next two.
        bank: Slots of one layer.
        slots: Shape (T, K), uint32.
        weights: As for ``moe_combine``, like the next three.
        shared: Shape (T, H), or None.
        shared_gate: Shape (T, 1), or None.
        residual: Shape (T, H), or None.

    Returns:
        Shape (T, H), dtype of the residual, else of shared, else float32.
    """
    layout = bank.layout
    fits = layout.intermediate_size <= MAX_WIDTH and slots.size * layout.payload_bytes <= MAX_BYTES
    if use_kernels() and is_quantized(layout) and fits:
        return expert_ffn_combine_kernel(x, bank, slots, weights, shared, shared_gate, residual)
    return moe_combine(expert_ffn(x, bank, slots), weights, shared, shared_gate, residual)

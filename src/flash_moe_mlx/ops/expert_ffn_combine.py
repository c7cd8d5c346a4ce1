"""A whole routed layer whose experts are all in slots: two launches on a GPU, including the shared expert."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from ..formats.expert_layout import RecordLayout
from .backend import use_kernels
from .expert_ffn import (
    SIMD_GROUPS,
    WORD_BYTES,
    ExpertPlan,
    expert_ffn,
    expert_ffn_kernel,
    expert_ffn_reference,
    gate_up,
    is_quantized,
    pairs_of,
    plan_experts,
    plan_of,
    projection_constants,
    same_parts,
)
from .gpu import kernel_source
from .gpu.geometry import CHUNK, SIMD_WIDTH, choose_geometry, choose_lanes
from .gpu.kernel_source import Kernel
from .moe_combine import moe_combine, moe_combine_reference
from .norm import Norm
from .slot_memory import ExpertRecords

STAGED_BYTES = 28 << 10
"""Threadgroup memory for the experts' h, of Metal's 32 KiB: each SIMD group stages that of its own expert."""

MAX_SIMD_GROUPS = 16

MAX_WIDTH = STAGED_BYTES // (4 * (CHUNK + 4)) * CHUNK // 2
"""Widest expert of which two fit into it."""

ROWS = 4
"""Rows of one expert that a lane takes at once."""

MIN_THREADGROUPS = 256
TILE_ROWS = 16
"""Outputs per threadgroup: fewer if the GPU would get too few threadgroups, because each one stages all experts' h."""


@dataclass(frozen=True)
class CombineSpread:
    """Geometry of down and combine.

    Attributes:
        lanes: Number of lanes that share a row.
        rows: Rows of one expert that a lane computes at once.
        sets: Number of such sets of rows that a SIMD group computes in sequence.
        simd_groups: SIMD groups per threadgroup, each computing one expert at a time.
        rounds: Number of experts that a SIMD group computes in sequence.
    """

    lanes: int
    rows: int
    sets: int
    simd_groups: int
    rounds: int

    @property
    def tile_rows(self) -> int:
        """Outputs per threadgroup."""
        return self.sets * (SIMD_WIDTH // self.lanes) * self.rows

    @property
    def threadgroup(self) -> tuple[int, int, int]:
        """Threads per threadgroup."""
        return (SIMD_WIDTH, self.simd_groups, 1)

    def grid(self, tokens: int, outputs: int) -> tuple[int, int, int]:
        """Total number of threads."""
        return (SIMD_WIDTH * tokens, self.simd_groups * -(-outputs // self.tile_rows), 1)


def choose_spread(hidden: int, width: int, lanes: int, experts: int, tile_rows: int | None = None) -> CombineSpread:
    """Choose the geometry for a layer.

    Args:
        hidden: Hidden size, H.
        width: Width of the routed or the shared experts, whichever is larger.
        lanes: Number of lanes that share a row: that of expert_down, on which the bits depend.
        experts: Number of experts per token, including the shared one.
        tile_rows: Outputs per threadgroup; None chooses it from the shapes.
    """
    if tile_rows is None:
        tile_rows = TILE_ROWS if hidden // TILE_ROWS >= MIN_THREADGROUPS else TILE_ROWS // 2
    sharing = SIMD_WIDTH // lanes
    rows = max(1, min(ROWS, tile_rows // sharing))
    most = min(MAX_SIMD_GROUPS, STAGED_BYTES // (width // CHUNK * (CHUNK + 4) * 4))
    rounds = -(-experts // most)
    return CombineSpread(lanes, rows, max(1, tile_rows // (sharing * rows)), -(-experts // rounds), rounds)


def combine_kernel(
    plan: ExpertPlan,
    experts: int,
    dtype: mx.Dtype,
    shared: mx.Dtype | None,
    gate_pitch: int,
    residual: bool,
    tile_rows: int | None = None,
) -> tuple[Kernel, CombineSpread]:
    """Return kernels/expert_down_combine.metal for a layer's layouts, and its geometry; absent inputs are compiled out.

    Args:
        plan: The layer's plan; states whether the shared expert is computed too.
        experts: Number of experts per token, K.
        dtype: Dtype of the result.
        shared: Dtype of the shared expert's output if that is an input; else None.
        gate_pitch: Columns of the array whose last column is the shared expert's gate; 0 without a gate.
        residual: Whether a residual is added.
        tile_rows: Outputs per threadgroup, from now on; None chooses it from the shapes.
    """
    key = (experts, dtype, shared, gate_pitch, residual)
    if key not in plan.combined or tile_rows is not None:
        layout, other = plan.layout, plan.shared or plan.layout
        lanes = choose_lanes(layout.intermediate_size // CHUNK)
        width = max(layout.intermediate_size, other.intermediate_size)
        spread = choose_spread(layout.hidden_size, width, lanes, experts + (plan.shared is not None), tile_rows)
        scaled, shared_scaled = (
            choose_geometry(
                "expert_ffn_combine", each.intermediate_size, pairs_of(each, "down_proj"), rows=1, simd_groups=1
            ).scaled_bits
            for each in (layout, other)
        )
        constants = (
            ("OUT", dtype),
            ("H", layout.hidden_size),
            ("I", layout.intermediate_size),
            ("SHARED_I", other.intermediate_size),
            ("K", experts),
            ("RECORD", layout.record_bytes // WORD_BYTES),
            ("SHARED_EXPERT", plan.shared is not None),
            ("SAME_PARTS", same_parts(layout, other)),
            ("HAS_SHARED", shared is not None),
            ("SHARED_X", shared or mx.float32),
            ("HAS_GATE", gate_pitch > 0),
            ("GATE_PITCH", gate_pitch),
            ("GATE_AT", gate_pitch - 1),
            ("HAS_RESIDUAL", residual),
            *projection_constants(layout, "down_proj", layout.intermediate_size),
            *projection_constants(other, "down_proj", other.intermediate_size, "SHARED_"),
            ("TILE", width),
            ("SCALED_BITS", scaled),
            ("SHARED_SCALED_BITS", shared_scaled),
            ("LANES", spread.lanes),
            ("ROWS", spread.rows),
            ("SETS", spread.sets),
            ("SIMD_GROUPS", spread.simd_groups),
            ("ROUNDS", spread.rounds),
        )
        plan.combined[key] = (Kernel("expert_down_combine", constants, spread.threadgroup), spread)
    return plan.combined[key]


def expert_ffn_combine_reference(
    x: mx.array,
    bank: ExpertRecords,
    slots: mx.array,
    weights: mx.array,
    shared: mx.array | ExpertRecords | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
    norm: Norm | None = None,
) -> mx.array:
    """Compute ``expert_ffn_combine`` in plain MLX operations."""
    if norm is not None:
        x = norm.reference(x)
    if isinstance(shared, ExpertRecords):
        shared = expert_ffn_reference(x, shared, mx.zeros((len(x), 1), mx.uint32))[:, 0]
    y = expert_ffn_reference(x, bank, slots)
    return moe_combine_reference(y, weights, shared, _last_column(shared_gate), residual)


def expert_ffn_combine_kernel(
    x: mx.array,
    bank: ExpertRecords,
    slots: mx.array,
    weights: mx.array,
    shared: mx.array | ExpertRecords | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
    norm: Norm | None = None,
    plan: ExpertPlan | None = None,
) -> mx.array:
    """Compute ``expert_ffn_combine`` on the GPU, for quantised records of experts at most MAX_WIDTH wide.

    Kernels: kernels/expert_gate_up.metal, kernels/expert_down_combine.metal. ``plan`` holds their constants; None
    builds it from the layouts and caches it.
    """
    own = shared if isinstance(shared, ExpertRecords) else None
    given = shared if isinstance(shared, mx.array) else None
    plan = plan or plan_of(bank.layout, None if own is None else own.layout)
    h = gate_up(x, bank, slots, plan, norm, own)
    dtype = combined_dtype(shared, residual)
    gate_pitch = 0 if shared_gate is None or shared is None else shared_gate.shape[1]
    given_dtype = None if given is None else given.dtype
    kernel, spread = combine_kernel(plan, slots.shape[1], dtype, given_dtype, gate_pitch, residual is not None)
    # The kernel always takes all inputs; any array replaces an absent one.
    (out,) = kernel_source.launch(
        kernel,
        [
            h,
            bank.array,
            slots.astype(mx.uint32),
            weights,
            own.array if own is not None else bank.array if given is None else given,
            weights if shared_gate is None else shared_gate,
            weights if residual is None else residual,
        ],
        [(x.shape, dtype)],
        spread.grid(x.shape[0], bank.layout.hidden_size),
    )
    return out


@cache
def _shared_plan(layout: RecordLayout, routed: RecordLayout) -> ExpertPlan:
    lanes = choose_lanes(routed.intermediate_size // CHUNK)
    pairs = pairs_of(layout, "down_proj")
    down = choose_geometry("expert_ffn", layout.intermediate_size, pairs, rows=4, simd_groups=SIMD_GROUPS, lanes=lanes)
    return plan_experts(layout, down_geometry=down)


def shared_expert(x: mx.array, shared: ExpertRecords, routed: RecordLayout, norm: Norm | None = None) -> mx.array:
    """Compute the output of the shared expert alone, with the bits that ``expert_ffn_combine`` gives it.

    Args:
        x: Hidden states. Shape (T, H).
        shared: The shared expert's record.
        routed: Layout of the routed experts of the same layer.
        norm: Norm of x, or None if x is already normalised.

    Returns:
        The shared expert's output. Shape (T, H), float32.
    """
    slots = mx.zeros((len(x), 1), mx.uint32)
    if not (use_kernels() and is_quantized(shared.layout) and is_quantized(routed)):
        return expert_ffn(x, shared, slots, norm=norm)[:, 0]
    return expert_ffn_kernel(x, shared, slots, _shared_plan(shared.layout, routed), norm)[:, 0]


def _last_column(shared_gate: mx.array | None) -> mx.array | None:
    return None if shared_gate is None else shared_gate[:, -1:]


def combined_dtype(shared: Any, residual: mx.array | None) -> mx.Dtype:
    """Return the dtype of the residual, else of the shared expert's output, else float32, like ``moe_combine``."""
    for array in (residual, shared):
        if isinstance(array, mx.array):
            return array.dtype
    return mx.float32


def expert_ffn_combine(
    x: mx.array,
    bank: ExpertRecords,
    slots: mx.array,
    weights: mx.array,
    shared: mx.array | ExpertRecords | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
    norm: Norm | None = None,
) -> mx.array:
    """Compute ``moe_combine(expert_ffn(norm(x), bank, slots), ...)`` in one call, with the same bits.

    For a layer whose experts are all in slots at once. On a GPU this takes two launches, and the per-expert outputs
    never leave the GPU's processors.

    Args:
        x: Hidden states. Shape (T, H), float32, bfloat16 or float16.
        bank: Slots of one layer.
        slots: Slot of each token's routed experts. Shape (T, K), uint32. One beyond the last slot reads the last.
        weights: Router weights. Shape (T, K).
        shared: The shared expert's record, its output (T, H), or None.
        shared_gate: Logits whose last column is that of the shared expert's gate, or None for a gate of one.
        residual: Residual that the layer's output is added to, shape (T, H), or None.
        norm: Norm of x, or None if x is already normalised.

    Returns:
        The layer's output. Shape (T, H), dtype of the residual, else of the shared expert's output, else float32.
    """
    if use_kernels() and fits(bank.layout, shared.layout if isinstance(shared, ExpertRecords) else None):
        return expert_ffn_combine_kernel(x, bank, slots, weights, shared, shared_gate, residual, norm)
    y = expert_ffn(x, bank, slots, norm=norm)
    return combine_outputs(y, x, bank.layout, weights, shared, shared_gate, residual, norm)


def combine_outputs(
    y: mx.array,
    x: mx.array,
    routed: RecordLayout,
    weights: mx.array,
    shared: mx.array | ExpertRecords | None,
    shared_gate: mx.array | None,
    residual: mx.array | None,
    norm: Norm | None = None,
) -> mx.array:
    """Compute the rest of ``expert_ffn_combine`` from the routed experts' outputs, with the same bits.

    Args:
        y: Outputs of the routed experts. Shape (T, K, H), float32.
        x: Hidden states, which the shared expert reads if ``shared`` is its record. Shape (T, H).
        routed: Layout of the routed experts.
        weights: Router weights. Shape (T, K).
        shared: As in ``expert_ffn_combine``.
        shared_gate: As in ``expert_ffn_combine``.
        residual: As in ``expert_ffn_combine``.
        norm: Norm of x, or None if x is already normalised.
    """
    if isinstance(shared, ExpertRecords):
        shared = shared_expert(x, shared, routed, norm)
    return moe_combine(y, weights, shared, _last_column(shared_gate), residual)


def fits(layout: RecordLayout, shared: RecordLayout | None) -> bool:
    """Return whether the kernel supports these layouts."""
    key = (id(layout), id(shared))
    if key not in _fitting:
        layouts = (layout,) if shared is None else (layout, shared)
        known = all(is_quantized(each) and each.intermediate_size <= MAX_WIDTH for each in layouts)
        _fitting[key] = (layout, shared, known)
    return _fitting[key][2]


_fitting: dict[tuple[int, int], tuple[RecordLayout, RecordLayout | None, bool]] = {}
"""Cached results of ``fits``, with the layouts, so that their ids stay unique."""

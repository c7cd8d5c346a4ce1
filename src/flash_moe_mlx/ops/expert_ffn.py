"""SwiGLU feed-forward of the routed experts, read from records in slots."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..errors import ShapeError
from ..formats.expert_layout import PART_ALIGNMENT, PROJECTIONS, RecordLayout
from .backend import use_cpu_kernels, use_kernels
from .gpu import kernel_source
from .gpu.geometry import Geometry, choose_geometry, load_width
from .gpu.kernel_source import Constants, Kernel
from .norm import Norm
from .numerics import Activation, swiglu
from .quantized import come_one_by_one, gathered_product, has_kernels
from .slot_memory import MLX_DTYPES, ExpertRecords

WORD_BYTES = 4
SIMD_GROUPS = 4
"""SIMD groups per threadgroup: experts are small, and more threadgroups finish more evenly."""


def project_reference(x: mx.array, bank: ExpertRecords, projection: str, slots: mx.array) -> mx.array:
    """Multiply one row for each (token, slot) pair with that slot's projection.

    Args:
        x: Rows. Shape (T, 1 or K, 1, in), float32.
        bank: Slots of one layer.
        projection: "gate_proj", "up_proj" or "down_proj".
        slots: Slot of each pair. Shape (T, K), uint32.

    Returns:
        The products. Shape (T, K, 1, out), float32.

    Only data that has to be converted to float32 is copied: that of the pairs if there are fewer pairs than slots,
    else that of all slots. Either way each pair is an independent product, so the bits are the same.
    """
    quantization = bank.layout.quantization(projection)
    parts = {part.part: bank.part(part.name) for part in bank.layout.quantized_parts(projection)}
    index = slots
    if slots.size <= bank.num_slots and (quantization is not None or parts["weight"].dtype != mx.float32):
        flat = slots.reshape(-1)
        parts = {name: part[flat] for name, part in parts.items()}
        index = mx.arange(slots.size, dtype=mx.uint32).reshape(slots.shape)
    if quantization is None:
        y = mx.gather_mm(x, parts["weight"].astype(mx.float32).swapaxes(-1, -2), rhs_indices=index)
    else:
        y = gathered_product(x, parts, quantization, index)
    if f"{projection}.bias" in bank.layout.by_name:
        y = y + bank.part(f"{projection}.bias")[slots].astype(mx.float32)[..., None, :]
    return y


def expert_ffn_reference(
    x: mx.array, bank: ExpertRecords, slots: mx.array, activation: Activation = swiglu
) -> mx.array:
    """Compute ``expert_ffn`` in plain MLX operations."""
    rows = x.astype(mx.float32)[:, None, None, :]
    up = project_reference(rows, bank, "up_proj", slots)
    gate = project_reference(rows, bank, "gate_proj", slots) if bank.layout.has_gate else up
    return project_reference(activation(up, gate), bank, "down_proj", slots).squeeze(2)


@dataclass(frozen=True, eq=False)
class ExpertPlan:
    """The expert kernels of a layer's layouts: built once, used by every step.

    Attributes:
        layout: The routed experts' layout, referenced so that its id stays unique.
        shared: The shared expert's layout, if it is computed together with the routed ones.
        down: Kernel kernels/expert_down.metal.
        gate_up_geometry: Geometry of gate and up.
        down_geometry: Geometry of down.
        constants: Constants of kernels/expert_gate_up.metal common to every dtype and norm.
        gate_up: Variants of that kernel by dtype of x, eps of its norm or None, and whether it computes the shared
            expert.
        combined: Variants of kernels/expert_down_combine.metal, which ``expert_ffn_combine`` builds.
    """

    layout: RecordLayout
    shared: RecordLayout | None
    down: Kernel
    gate_up_geometry: Geometry
    down_geometry: Geometry
    constants: Constants
    gate_up: dict[tuple[mx.Dtype, float | None, bool], Kernel] = field(default_factory=dict)
    combined: dict[Any, tuple[Kernel, Any]] = field(default_factory=dict)

    def gate_up_kernel(self, dtype: mx.Dtype, norm: Norm | None, shared: bool) -> Kernel:
        """Return kernels/expert_gate_up.metal for a dtype of x."""
        key = (dtype, None if norm is None else norm.eps, shared)
        if key not in self.gate_up:
            extra = (("HAS_NORM", norm is not None), ("EPS", 0.0 if norm is None else norm.eps), ("HAS_SHARED", shared))
            constants = (("X", dtype), *extra, *self.constants)
            self.gate_up[key] = Kernel("expert_gate_up", constants, self.gate_up_geometry.threadgroup)
        return self.gate_up[key]


def is_quantized(layout: RecordLayout) -> bool:
    """Return whether all projections are quantised in modes that the GPU's kernels support."""
    return has_kernels(layout, "gpu") and all(quantization for _, quantization in layout.quantizations)


def projection_constants(layout: RecordLayout, projection: str, columns: int, prefix: str = "") -> Constants:
    """Return the position of one projection in the record, in words, and its quantisation."""
    prefix += projection.removesuffix("_proj").upper()
    quantization = layout.quantization(projection)
    assert quantization is not None
    parts = layout.by_name
    scales, biases = parts[f"{projection}.scales"], parts[f"{projection}.biases"]
    bias = parts.get(f"{projection}.bias")
    if scales.dtype != biases.dtype:
        raise ShapeError(
            f"[expert_ffn] scales and biases of {projection} must have one dtype, got {scales.dtype} and "
            f"{biases.dtype}. Set FLASH_MOE_REFERENCE=1 to run MLX's own operations."
        )
    offsets = {
        "WEIGHT": parts[f"{projection}.weight"].offset,
        "SCALES": scales.offset,
        "BIASES": biases.offset,
        "BIAS": bias.offset if bias else 0,
    }
    if any(offset % PART_ALIGNMENT for offset in (*offsets.values(), layout.record_bytes)):
        raise ShapeError(
            f"[expert_ffn] the record and its parts must start on {PART_ALIGNMENT}-byte boundaries, got offsets "
            f"{offsets} in records of {layout.record_bytes} bytes. Pack the checkpoint again."
        )
    return (
        (f"{prefix}_BITS", quantization.bits),
        (f"{prefix}_GROUP", quantization.group_size),
        (f"{prefix}_WIDTH", load_width(columns, quantization.bits)),
        (f"{prefix}_S", MLX_DTYPES[scales.dtype]),
        (f"{prefix}_B", MLX_DTYPES[bias.dtype] if bias else mx.float32),
        (f"{prefix}_HAS_BIAS", bias is not None),
        *((f"{prefix}_{name}", offset // WORD_BYTES) for name, offset in offsets.items()),
    )


def pairs_of(layout: RecordLayout, *projections: str) -> list[tuple[int, int]]:
    """Return (bits, group size) of the quantised projections."""
    pairs = []
    for projection in projections:
        quantization = layout.quantization(projection)
        assert quantization is not None
        pairs.append((quantization.bits, quantization.group_size))
    return pairs


def same_parts(layout: RecordLayout, shared: RecordLayout) -> bool:
    """Return whether a record of one layout can be read as one of the other."""
    return layout.parts == shared.parts and all(
        layout.quantization(projection) == shared.quantization(projection) for projection in PROJECTIONS
    )


def plan_experts(
    layout: RecordLayout,
    gate_up_geometry: Geometry | None = None,
    down_geometry: Geometry | None = None,
    shared: RecordLayout | None = None,
) -> ExpertPlan:
    """Build the constants of the expert kernels for a layer's layouts.

    Args:
        layout: Layout of a record whose three projections are quantised.
        gate_up_geometry: Geometry of gate and up; None chooses it from the shapes.
        down_geometry: Geometry of down; None chooses it from the shapes.
        shared: Layout of the shared expert's record: quantised, of the same hidden size, without biases.

    Raises:
        ShapeError: If the kernels can't read this layout.
    """
    hidden, width = layout.hidden_size, layout.intermediate_size
    if gate_up_geometry is None:
        gate_up_geometry = choose_geometry(
            "expert_ffn", hidden, pairs_of(layout, "gate_proj", "up_proj"), rows=2, simd_groups=SIMD_GROUPS
        )
    if down_geometry is None:
        down_geometry = choose_geometry(
            "expert_ffn", width, pairs_of(layout, "down_proj"), rows=4, simd_groups=SIMD_GROUPS
        )
    shape = (("H", hidden), ("I", width), ("RECORD", layout.record_bytes // WORD_BYTES))
    other = layout if shared is None else shared
    scaled = choose_geometry("expert_ffn", hidden, pairs_of(other, "gate_proj", "up_proj"), rows=2, simd_groups=1)
    constants = (
        *shape,
        *projection_constants(layout, "gate_proj", hidden),
        *projection_constants(layout, "up_proj", hidden),
        ("SHARED_I", other.intermediate_size),
        ("SAME_PARTS", same_parts(layout, other)),
        ("SHARED_SCALED_BITS", scaled.scaled_bits),
        *projection_constants(other, "gate_proj", hidden, "SHARED_"),
        *projection_constants(other, "up_proj", hidden, "SHARED_"),
        *gate_up_geometry.constants,
    )
    down = (
        *shape,
        *projection_constants(layout, "down_proj", width),
        *down_geometry.constants,
    )
    return ExpertPlan(
        layout,
        shared,
        Kernel("expert_down", down, down_geometry.threadgroup),
        gate_up_geometry,
        down_geometry,
        constants,
    )


def plan_of(layout: RecordLayout, shared: RecordLayout | None = None) -> ExpertPlan:
    """Return the plan of a layer's layouts, built on first use and kept with the layout as long as that lives."""
    plans: dict[int, ExpertPlan] = vars(layout).setdefault("_gpu_plans", {})
    plan = plans.get(id(shared))
    if plan is None:
        plan = plans[id(shared)] = plan_experts(layout, shared=shared)
    return plan


def gate_up(
    x: mx.array,
    bank: ExpertRecords,
    slots: mx.array,
    plan: ExpertPlan,
    norm: Norm | None = None,
    shared: ExpertRecords | None = None,
) -> mx.array:
    """Return the inputs of the down projection, float32: (T * K, I), flat, then (T, Is) of a shared expert, if any.

    Kernel: kernels/expert_gate_up.metal.

    Raises:
        ShapeError: If x is not as wide as the experts.
    """
    layout = bank.layout
    tokens, experts = slots.shape
    if x.shape[1] != layout.hidden_size or tokens != x.shape[0]:
        raise ShapeError(
            f"[expert_ffn] x must be (T, {layout.hidden_size}) and slots (T, K), got {x.shape} and {slots.shape}. "
            "Pass the layer's own bank."
        )
    width = layout.intermediate_size
    shared_width = 0 if shared is None else shared.layout.intermediate_size
    # The kernel always takes all inputs; any array of the right type replaces an absent one.
    (h,) = kernel_source.launch(
        plan.gate_up_kernel(x.dtype, norm, shared is not None),
        [
            x,
            x if norm is None else norm.weight,
            bank.array,
            slots.astype(mx.uint32),
            bank.array if shared is None else shared.array,
        ],
        [((tokens * (experts * width + shared_width),), mx.float32)],
        plan.gate_up_geometry.grid(tokens * (experts + (shared is not None)), max(width, shared_width)),
    )
    return h


def expert_ffn_kernel(
    x: mx.array, bank: ExpertRecords, slots: mx.array, plan: ExpertPlan | None = None, norm: Norm | None = None
) -> mx.array:
    """Compute ``expert_ffn`` on the GPU, for quantised records.

    Kernels: kernels/expert_gate_up.metal, kernels/expert_down.metal.

    Args:
        x: Tokens. Shape (T, H).
        bank: Slots of one layer.
        slots: Slot of each token's routed experts. Shape (T, K), uint32.
        plan: Constants; None builds them from the layout and caches them.
        norm: Norm of x, or None where x is normalised already.

    Raises:
        ShapeError: If the kernels can't read this layout, or x is not as wide as the experts.
    """
    plan = plan or plan_of(bank.layout)
    h = gate_up(x, bank, slots, plan, norm)
    tokens, experts = slots.shape
    hidden = x.shape[1]
    (y,) = kernel_source.launch(
        plan.down,
        [h, bank.array, slots.astype(mx.uint32)],
        [((tokens, experts, hidden), mx.float32)],
        plan.down_geometry.grid(tokens * experts, hidden),
    )
    return y


def expert_ffn(
    x: mx.array, bank: ExpertRecords, slots: mx.array, activation: Activation | None = None, norm: Norm | None = None
) -> mx.array:
    """Compute the SwiGLU feed-forward of the K routed experts of each token.

    Computes ``W_d (silu(W_g x) * W_u x)`` for each slot, plus the experts' own biases if the record has them.
    Quantised weights may be of any mode of `formats.schemes`.

    Args:
        x: Hidden states. Shape (T, H), float32, bfloat16 or float16.
        bank: Slots of one layer.
        slots: Slot of each token's routed experts. Shape (T, K), uint32.
        activation: Activation instead of SwiGLU, for models with another one; runs the reference.
        norm: Norm of x, or None if x is already normalised.

    Returns:
        Per-expert outputs, shape (T, K, H), float32. Sums are float32. Each (token, slot) pair is
        computed independently: its bits depend on no other pair.

    Raises:
        ShapeError: If the kernels can't read this layout, or x is not as wide as the experts.

    Cost: reads T * K records. Records that no kernel takes (unquantised on a GPU, some modes) run the reference.
    Reference: Shazeer 2020, arXiv:2002.05202.
    """
    if activation is None and use_kernels() and is_quantized(bank.layout):
        return expert_ffn_kernel(x, bank, slots, norm=norm)
    if norm is not None:
        x = norm.reference(x)
    if use_cpu_kernels() and has_kernels(bank.layout, "cpu"):
        from .cpu import experts

        return experts.expert_ffn(x, bank, slots, activation)
    # Not "or": an nn.Module without parameters is an empty dict, hence false.
    chosen = swiglu if activation is None else activation
    if not come_one_by_one(bank.layout, slots.size):
        return expert_ffn_reference(x, bank, slots, chosen)
    tokens, k = slots.shape
    outputs = []
    for token in range(tokens):
        for rank in range(k):
            outputs.append(expert_ffn_reference(x[token : token + 1], bank, slots[token, rank].reshape(1, 1), chosen))
            mx.eval(outputs[-1])
    return mx.concatenate(outputs, axis=1).reshape(tokens, k, -1)

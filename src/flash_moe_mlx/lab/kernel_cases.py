"""Benchmark cases: MoE layers, quantised matvecs and gated delta steps at real models' dimensions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_ops, normalize_qk
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from ..formats.expert_layout import PROJECTIONS, Quantization, RecordLayout
from ..ops.dequant_matvec import dequant_matvec, dequant_matvec_kernel
from ..ops.expert_ffn import ExpertPlan, expert_ffn_kernel, plan_experts
from ..ops.expert_ffn_combine import combine_kernel, expert_ffn_combine, expert_ffn_combine_kernel
from ..ops.gated_delta import gated_delta, gated_delta_kernel, gated_delta_reference
from ..ops.gated_delta_step import Columns, gated_delta_conv_step
from ..ops.gpu.geometry import Geometry, choose_geometry
from ..ops.moe_combine import moe_combine
from ..ops.norm import Norm
from ..ops.slot_memory import ExpertRecords
from .kernel_timing import Row, compare, relative_rms, sample

GROUP = 64

DeltaRule = Callable[..., tuple[mx.array, mx.array]]
"""An operation of the gated delta rule that returns (y, new state)."""


@dataclass(frozen=True)
class Model:
    """Dimensions of a Qwen3.5-MoE: hidden size, expert width, and enough slots to exceed every processor cache."""

    name: str
    hidden: int
    width: int
    slots: int


MODELS = (Model("397B", 4096, 1024, 64), Model("122B", 3072, 1024, 80), Model("35B", 2048, 512, 256))


def expert_layout(hidden: int, width: int, bits: int) -> RecordLayout:
    """Return the layout of an expert as mlx-lm quantises it: bfloat16 scales and biases, groups of 64."""
    specs = {}
    for projection in PROJECTIONS:
        out, columns = (hidden, width) if projection == "down_proj" else (width, hidden)
        specs[projection, "weight"] = ("U32", (out, columns * bits // 32))
        specs[projection, "scales"] = ("BF16", (out, columns // GROUP))
        specs[projection, "biases"] = ("BF16", (out, columns // GROUP))
    return RecordLayout.contiguous(specs, dict.fromkeys(PROJECTIONS, Quantization(bits, GROUP)))


def random_matrix(shape: tuple[int, ...], columns: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return random packed weights with zero mean and a scale that keeps products near one."""
    packed = (*shape, columns * bits // 32)
    high, low = (mx.random.randint(0, 2**16, packed, dtype=mx.uint32) for _ in range(2))
    weight = high * 2**16 + low
    scales = mx.random.uniform(0.5, 1.5, (*shape, columns // GROUP)) * (columns**-0.5 * 3.5 / 2**bits)
    scales = scales.astype(mx.bfloat16)
    biases = (scales.astype(mx.float32) * (-(2**bits - 1) / 2)).astype(mx.bfloat16)
    return weight, scales, biases


class Layer:
    """One MoE layer's experts, as our records and as mlx-lm's SwitchGLU with the same bytes."""

    def __init__(self, model: Model, bits: int):
        self.model, self.bits = model, bits
        self.layout = expert_layout(model.hidden, model.width, bits)
        self.switch = SwitchGLU(64, 64, 1)
        pieces = []
        for projection in PROJECTIONS:
            columns = model.width if projection == "down_proj" else model.hidden
            out = self.layout.by_name[f"{projection}.weight"].shape[0]
            parts = random_matrix((model.slots, out), columns, bits)
            linear = QuantizedSwitchLinear(64, 64, 1, bias=False, group_size=GROUP, bits=bits)
            linear.weight, linear.scales, linear.biases = parts
            setattr(self.switch, projection, linear)
            pieces += [part.reshape(model.slots, -1).view(mx.uint32) for part in parts]
        used = sum(piece.shape[1] for piece in pieces)
        pieces.append(mx.zeros((model.slots, self.layout.record_bytes // 4 - used), mx.uint32))
        # Written by the GPU, so that the bytes are where a kernel's output would be; nothing has read them yet.
        array = mx.concatenate(pieces, axis=1)
        mx.eval(array, self.switch.parameters())
        self.bank = ExpertRecords(self.layout, array)


def routes(model: Model, experts: int, calls: int) -> list[mx.array]:
    """Return the slots of each call: distinct within a call, random across calls."""
    made = [mx.random.permutation(model.slots)[None, :experts].astype(mx.uint32) for _ in range(calls)]
    mx.eval(made)
    return made


def moe_layer(
    layer: Layer, experts: int, *, calls: int, samples: int, plan: ExpertPlan | None = None, launches: int = 2
) -> Row:
    """Time a chain of routed layers, each feeding the next: gate, up, down, combine, residual.

    The other side is mlx-lm's SwitchGLU with the same final steps. With ``plan``, only our side runs, with the plan's
    thread layout.
    """
    model = layer.model
    slots = routes(model, experts, calls)
    weights = mx.softmax(mx.random.normal((1, experts)))
    x = mx.random.normal((1, model.hidden)).astype(mx.bfloat16)
    shared = mx.zeros((1, model.hidden), mx.bfloat16)
    gate = mx.zeros((1, 1), mx.bfloat16)
    mx.eval(weights, x, shared, gate)
    narrow = weights.astype(mx.bfloat16)

    def our_layer(h: mx.array, ids: mx.array, residual: mx.array) -> mx.array:
        if plan is None:
            return expert_ffn_combine(h, layer.bank, ids, weights, shared, gate, residual)
        if launches == 2:
            return expert_ffn_combine_kernel(h, layer.bank, ids, weights, shared, gate, residual, plan=plan)
        return moe_combine(expert_ffn_kernel(h, layer.bank, ids, plan), weights, shared, gate, residual)

    def their_layer(h: mx.array, ids: mx.array, residual: mx.array) -> mx.array:
        y = (layer.switch(h, ids) * narrow[..., None]).sum(axis=-2)
        return residual + (y + mx.sigmoid(gate) * shared)

    def chain(apply: Callable[[mx.array, mx.array, mx.array], mx.array]) -> list[mx.array]:
        h = x
        for ids in slots:
            h = apply(h, ids, x)
        return [h]

    # Against float32, since bfloat16 sums of MLX's are several percent off on a CPU, and without a residual, whose
    # rounding would be most of the difference.
    wide, none = x.astype(mx.float32), mx.zeros_like(x)
    close = relative_rms(our_layer(x, slots[0], none), their_layer(wide, slots[0], none))
    theirs = partial(chain, their_layer) if plan is None else None
    name = f"MoE layer {model.name} K={experts} {layer.bits}-bit"
    nbytes = experts * layer.layout.payload_bytes
    return compare(name, partial(chain, our_layer), theirs, calls, nbytes, samples, close)


def spread_plan(
    layer: Layer,
    experts: int,
    gate_up: tuple[int, int] | None = None,
    down: tuple[int, int] | None = None,
    tile_rows: int | None = None,
) -> ExpertPlan:
    """Return a plan whose kernels use other thread layouts; None keeps the plan's own.

    Args:
        layer: The layer to plan for.
        experts: K.
        gate_up: Rows per lane and SIMD groups per threadgroup of expert_gate_up.
        down: The same for expert_down.
        tile_rows: Outputs per threadgroup of expert_down_combine.
    """
    model, pair = layer.model, (layer.bits, GROUP)
    made = []
    for columns, pairs, spread in ((model.hidden, [pair] * 2, gate_up), (model.width, [pair], down)):
        made.append(
            None if spread is None else choose_geometry("bench", columns, pairs, rows=spread[0], simd_groups=spread[1])
        )
    plan = plan_experts(layer.layout, made[0], made[1])
    combine_kernel(plan, experts, mx.bfloat16, mx.bfloat16, 1, True, tile_rows)
    return plan


def matvec(
    outputs: int,
    columns: int,
    bits: int,
    rows: int,
    *,
    copies: int,
    rounds: int,
    samples: int,
    geometry: Geometry | None = None,
) -> Row:
    """Time products with ``copies`` matrices in turn, ``rounds`` times, against ``mx.quantized_matmul``.

    The products are independent: on both sides, a GPU may overlap the end of one with the start of the next.
    """
    matrices = [random_matrix((outputs,), columns, bits) for _ in range(copies)]
    x = mx.random.normal((rows, columns)).astype(mx.bfloat16)
    mx.eval(matrices, x)

    def ours() -> list[mx.array]:
        if geometry is None:
            return [dequant_matvec(x, *matrix, bits=bits, group_size=GROUP) for matrix in matrices * rounds]
        return [
            dequant_matvec_kernel(x, *matrix, bits=bits, group_size=GROUP, geometry=geometry)
            for matrix in matrices * rounds
        ]

    def theirs() -> list[mx.array]:
        return [mx.quantized_matmul(x, *matrix, group_size=GROUP, bits=bits) for matrix in matrices * rounds]

    nbytes = sum(part.nbytes for part in matrices[0])
    name = f"matvec {outputs}x{columns} {bits}-bit M={rows}"
    exact = mx.quantized_matmul(x.astype(mx.float32), *matrices[0], group_size=GROUP, bits=bits)
    close = relative_rms(ours()[0], exact)
    return compare(name, ours, theirs if geometry is None else None, copies * rounds, nbytes, samples, close)


def delta_inputs(steps: int, k_heads: int, v_heads: int, size: int) -> list[mx.array]:
    """Return q, k, v, a, b, A_log and dt_bias of one layer, in bfloat16 as in the model."""
    shapes = [(k_heads, size), (k_heads, size), (v_heads, size), (v_heads,), (v_heads,)]
    arrays = [mx.random.normal((1, steps, *shape)).astype(mx.bfloat16) for shape in shapes]
    return [*arrays, mx.random.uniform(0, 2, (v_heads,)), mx.ones((v_heads,))]


def delta_step(k_heads: int, v_heads: int, size: int, *, calls: int, states: int, samples: int, **tuning: int) -> Row:
    """Time a chain of decode steps on the states of several layers in turn: y of one step is v of the next."""
    q, k, v, *rest = delta_inputs(1, k_heads, v_heads, size)
    own = [mx.random.normal((1, v_heads, size, size)) for _ in range(states)]
    mx.eval(q, k, v, rest, own)
    step: DeltaRule = gated_delta_kernel if tuning else gated_delta

    def ours() -> list[mx.array]:
        y, outputs = v, []
        for i in range(calls):
            y, new_state = step(q, k, y, *rest, own[i % states], **tuning)
            outputs.append(new_state)
        return [y, *outputs]

    nbytes = 2 * own[0].nbytes
    return compare(f"gated delta step {v_heads} heads of {size}", ours, None, calls, nbytes, samples)


def delta_conv_step(k_heads: int, v_heads: int, size: int, *, calls: int, states: int, samples: int) -> Row:
    """Time decode steps with convolution and gated norm; each step's convolution depends on the previous one's."""
    keys, values, share = k_heads * size, v_heads * size, v_heads // k_heads
    channels = 2 * keys + values
    b = channels + values
    columns = Columns(0, keys, size, 2 * keys, channels, share * size, b, b + v_heads, share)
    *_, A_log, dt_bias = delta_inputs(1, k_heads, v_heads, size)
    conv_state = mx.random.normal((1, 3, channels)).astype(mx.bfloat16)
    conv_weight = mx.random.normal((channels, 4)).astype(mx.bfloat16)
    projected = mx.random.normal((1, b + 2 * v_heads)).astype(mx.bfloat16)
    norm = Norm(mx.ones((size,), mx.bfloat16), 1e-6)
    own = [mx.random.normal((1, v_heads, size, size)) for _ in range(states)]
    mx.eval(A_log, dt_bias, conv_state, conv_weight, projected, norm.weight, own)

    def ours() -> list[mx.array]:
        conv, outputs = conv_state, []
        for i in range(calls):
            _, conv, new_state = gated_delta_conv_step(
                projected, columns, conv, conv_weight, A_log, dt_bias, own[i % states], norm
            )
            outputs.append(new_state)
        return [conv, *outputs]

    return compare(f"gated delta conv step {v_heads} heads of {size}", ours, None, calls, 2 * own[0].nbytes, samples)


def delta_prompt(steps: int, k_heads: int, v_heads: int, size: int, *, calls: int, samples: int, **tuning: int) -> Row:
    """Time a prompt through a few layers, one launch per layer, against a loop of operations."""
    inputs = delta_inputs(steps, k_heads, v_heads, size)
    state = mx.random.normal((1, v_heads, size, size))
    mx.eval(inputs, state)

    q, k, v, *rest = inputs
    kernel: DeltaRule = gated_delta_kernel if tuning else gated_delta
    loop: DeltaRule = gated_delta_reference

    def chain(layer: DeltaRule, **options: int) -> list[mx.array]:
        y, states = v, []
        for _ in range(calls):
            y, new_state = layer(q, k, y, *rest, state, **options)
            states.append(new_state)
        return [y, *states]

    def ours() -> list[mx.array]:
        return chain(kernel, **tuning)

    def theirs() -> list[mx.array]:
        return chain(loop)

    name = f"gated delta {steps} tokens {v_heads} heads of {size}"
    nbytes = 2 * state.nbytes + sum(array.nbytes for array in inputs[:3]) + inputs[2].nbytes
    if tuning:
        return compare(name, ours, None, calls, nbytes, samples)
    close = relative_rms(kernel(*inputs, state)[0], loop(*inputs, state)[0])
    return compare(name, ours, theirs, calls, nbytes, samples, close)


def mlx_lm_prompt(steps: int, k_heads: int, v_heads: int, size: int) -> float:
    """Return the microseconds of mlx-lm's own loop over the given tokens, with a compiled step, second run."""
    q, k, v, a, b, *_ = delta_inputs(steps, k_heads, v_heads, size)
    q, k = normalize_qk(q, k, inv_scale=size**-0.5, eps=1e-6)
    decay, beta = mx.exp(-mx.abs(a).astype(mx.float32)), mx.sigmoid(b)
    state = mx.zeros((1, v_heads, size, size))
    mx.eval(q, k, v, decay, beta, state)

    def work() -> list[mx.array]:
        return list(gated_delta_ops(q, k, v, decay, beta, state))

    sample(work, 1)
    return sample(work, 1)

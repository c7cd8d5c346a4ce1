"""Runs each operation once at a small size by kernel and by reference, for ``flash-moe doctor``.

If the Metal compiler rejects a kernel, the error appears only when its result is evaluated, in the middle of an
answer. This check triggers compilation in advance and puts the message in a report.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..ops.backend import REFERENCE_SWITCH, references, use_kernels
from ..ops.dequant_matvec import dequant_matvec
from ..ops.dequantize import dense_matrix
from ..ops.expert_ffn import expert_ffn
from ..ops.expert_ffn_combine import expert_ffn_combine
from ..ops.gated_delta import gated_delta
from ..ops.gated_delta_step import Columns, gated_delta_conv_step
from ..ops.moe_combine import moe_combine
from ..ops.norm import Norm
from ..ops.norm_matvec import Matrix, matvec_residual, norm_matvec
from ..ops.qk_norm_rope import Heads, qk_norm_rope, rotation
from ..ops.router_topk import router_topk
from .kernel_cases import GROUP, Layer, Model, random_matrix
from .kernel_timing import relative_rms

LARGEST_DIFFERENCE = 2e-2
"""Maximum relative RMS between a correct kernel and its reference in bfloat16."""

Operation = Callable[[], list[mx.array]]


@dataclass(frozen=True)
class KernelCheck:
    """Result of checking one operation.

    Attributes:
        name: The operation.
        difference: Relative RMS between kernel and reference; None if there is no result.
        seconds: Time of the kernel's first run, including compilation.
        error: The compiler's message, or None.
    """

    name: str
    difference: float | None
    seconds: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the kernel compiled and matches its reference."""
        return self.difference is not None and self.difference <= LARGEST_DIFFERENCE

    def __str__(self) -> str:
        if self.ok:
            return f"ok, within {self.difference:.1e} of its reference, {self.seconds:.2f} s"
        if self.error is not None:
            return f"failed: {self.error} ({REFERENCE_SWITCH}=1 runs without kernels)"
        return f"wrong by {self.difference:.1e} ({REFERENCE_SWITCH}=1 runs without kernels)"


def check_kernels() -> Iterator[KernelCheck]:
    """Run every operation with the default device's kernels and with its reference."""
    mx.random.seed(0)
    for name, operation in operations():
        started = time.perf_counter()
        try:
            results = operation()
            mx.eval(results)
        except RuntimeError as error:  # MLX raises this if a kernel doesn't compile or can't be launched
            yield KernelCheck(name, None, time.perf_counter() - started, str(error).strip())
            continue
        seconds = time.perf_counter() - started
        with references():
            expected = operation()
            mx.eval(expected)
        pairs = zip(results, expected, strict=True)
        yield KernelCheck(name, max(relative_rms(result, other) for result, other in pairs), seconds)


def operations() -> Iterator[tuple[str, Operation]]:
    """Return every operation that has a GPU kernel, with its name, on random bfloat16 inputs.

    Leaves out `fetch_records`, which reads from addresses: only those that a slot memory has mapped are safe.
    """
    hidden, experts, k = 128, 8, 2
    layer = Layer(Model("check", hidden, 128, experts), 4)
    x, residual = (mx.random.normal((1, hidden)).astype(mx.bfloat16) for _ in range(2))
    slots, weights = mx.array([[3, 5]], mx.uint32), mx.array([[0.7, 0.3]])
    y = mx.random.normal((1, k, hidden))
    yield "expert_ffn", lambda: [expert_ffn(x, layer.bank, slots)]
    yield "expert_ffn_combine", lambda: [expert_ffn_combine(x, layer.bank, slots, weights, None, None, residual)]
    yield "moe_combine", lambda: [moe_combine(y, weights, None, None, residual)]

    for bits in (2, 4, 8):
        yield f"dequant_matvec {bits} bits", _matvec(x, random_matrix((256,), hidden, bits), bits)
    whole = random_matrix((64,), hidden, 4)
    yield "dequantize", lambda: [_dense(whole)]
    norm = Norm(mx.ones((hidden,)).astype(mx.bfloat16), 1e-6)
    matrix = Matrix(*random_matrix((hidden,), hidden, 4), 4, GROUP)
    yield "norm_matvec", lambda: [norm_matvec(x, norm, matrix)]
    yield "matvec_residual", lambda: [matvec_residual(x, matrix, residual)]

    logits = mx.random.normal((1, 64))
    yield "router_topk", lambda: list(router_topk(logits, 64, 4, True))
    heads, head_norm = Heads(1, 1, 32, 0, 32, 32), Norm(mx.ones((32,)).astype(mx.bfloat16), 1e-6)
    projected = mx.random.normal((1, 64)).astype(mx.bfloat16)
    turns = rotation(7, 16, 1e4)
    yield "qk_norm_rope", lambda: list(qk_norm_rope(projected, heads, head_norm, head_norm, turns))

    q, key, v = (mx.random.normal((1, 5, 2, 32)).astype(mx.bfloat16) for _ in range(3))
    a, b = (mx.random.normal((1, 5, 2)).astype(mx.bfloat16) for _ in range(2))
    decay, state = mx.ones((2,)), mx.random.normal((1, 2, 32, 32))
    yield "gated_delta", lambda: list(gated_delta(q, key, v, a, b, decay, decay, state))
    columns, one = Columns(0, 32, 32, 64, 96, 32, 128, 129, 1), mx.ones((1,))
    conv_state, conv_weight = (mx.random.normal(shape).astype(mx.bfloat16) for shape in ((1, 3, 96), (96, 4)))
    row, own = mx.random.normal((1, 130)).astype(mx.bfloat16), mx.random.normal((1, 1, 32, 32))
    yield (
        "gated_delta_conv_step",
        lambda: list(gated_delta_conv_step(row, columns, conv_state, conv_weight, one, one, own, head_norm)),
    )


def _matvec(x: mx.array, matrix: tuple[mx.array, mx.array, mx.array], bits: int) -> Operation:
    return lambda: [dequant_matvec(x, *matrix, bits=bits, group_size=GROUP)]


def _dense(matrix: tuple[mx.array, mx.array, mx.array]) -> mx.array:
    if use_kernels():
        return dense_matrix(*matrix, bits=4, group_size=GROUP, dtype=mx.bfloat16)
    return mx.dequantize(*matrix, group_size=GROUP, bits=4)

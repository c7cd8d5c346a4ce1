"""Faults planted into the bodies: each must fail the bench, or the bench proves nothing."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.gpu import kernel_source

from . import opencl
from .calls import record
from .lint import lint_body

pytestmark = pytest.mark.skipif(opencl.opencl() is None, reason="needs the OpenCL CPU runtime of the dev extra")

Edit = Callable[[str, str], tuple[str, str]]
LIMIT = 2e-6


def in_helpers(old: str, new: str) -> Edit:
    def edit(helpers: str, body: str) -> tuple[str, str]:
        assert helpers.count(old) == 1, f"{old!r} must occur once in the helpers"
        return helpers.replace(old, new), body

    return edit


def in_body(old: str, new: str, count: int = 1) -> Edit:
    def edit(helpers: str, body: str) -> tuple[str, str]:
        assert body.count(old) == count, f"{old!r} must occur {count} times in the body"
        return helpers, body.replace(old, new)

    return edit


def run(launch: tuple[Any, ...], order: str, edit: Edit | None = None) -> np.ndarray:
    results = opencl.launch(*launch, order=order, edit=edit)
    return np.concatenate([np.array(result.astype(mx.float32), np.float64).reshape(-1) for result in results])


def differs(launch: tuple[Any, ...], order: str, edit: Edit) -> bool:
    """Tell whether a mutant's result is wrong: not finite, or further from the body's than rounding."""
    expected, result = run(launch, order), run(launch, order, edit)
    if not np.isfinite(result).all():
        return True
    return bool(np.sqrt(((result - expected) ** 2).sum() / (expected**2).sum()) > LIMIT)


DEQUANTIZED_WRONGLY = {
    "wrong shift": in_body("(index % (32 / BITS) * BITS)", "(index % (32 / BITS))"),
    "off-by-one group": in_body("index / GROUP", "(index + 1) / GROUP"),
    "wrong matrix": in_body("slots[matrix]", "matrix"),
    "not all weights": in_body("index < count", "index + 1 < count"),
}


@pytest.mark.parametrize("fault", DEQUANTIZED_WRONGLY)
def test_a_wrong_dequantisation_shows(fault: str, monkeypatch: pytest.MonkeyPatch):
    assert differs(record(monkeypatch, "dequantize"), "ascending", DEQUANTIZED_WRONGLY[fault])


MATVECS = (
    "dequant_matvec", "expert_gate_up", "expert_down", "expert_down_combine", "norm_matvec", "matvec_residual"
)  # fmt: skip

WRONG_RESULTS = {
    "wrong shift": in_helpers("words[bit / 32] >> (SCALED ? bit & 16", "words[bit / 32] >> (SCALED ? bit & 8"),
    "off-by-one group": in_helpers("chunk * FM_CHUNK / GROUP", "(chunk * FM_CHUNK + 32) / GROUP"),
    "scale and bias swapped": in_helpers(
        "rows.scales[r] = scales[group_row + group];\n    rows.biases[r] = biases[group_row + group];",
        "rows.scales[r] = biases[group_row + group];\n    rows.biases[r] = scales[group_row + group];",
    ),
    "wrong position scale": in_helpers("((index + 1) % positions)", "(index % positions)"),
}


@pytest.mark.parametrize("order", opencl.SIMD_ORDERS)
@pytest.mark.parametrize("fault", WRONG_RESULTS)
@pytest.mark.parametrize("name", MATVECS)
def test_wrong_arithmetic_shows(name: str, fault: str, order: str, monkeypatch: pytest.MonkeyPatch):
    assert differs(record(monkeypatch, name), order, WRONG_RESULTS[fault])


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STAGED = {
    "dequant_matvec": f"  {BARRIER}\n  for (; chunk",
    "norm_matvec": f"  {BARRIER}\n  fm_dot_tile",
    "matvec_residual": f"  {BARRIER}\n  fm_dot_tile",
    "expert_gate_up": f"    {BARRIER}\n    for (; chunk",
    "expert_down": f"  {BARRIER}\n  for (; chunk",
    "expert_down_combine": f"{BARRIER}\nconst uint own_row",
    "gated_delta": f"    {BARRIER}\n  }}\n  if (start < length)",
    "gated_delta_conv_step": f"{BARRIER}\nfloat q_squares",
    "router_topk": f"{BARRIER}\nfor (uint expert",
}


@pytest.mark.parametrize("order", opencl.SIMD_ORDERS)
@pytest.mark.parametrize("name", STAGED)
def test_a_missing_barrier_shows_in_every_order(name: str, order: str, monkeypatch: pytest.MonkeyPatch):
    """Values staged by one SIMD group must not be read by another before the barrier, in any order."""

    def edit(helpers: str, body: str) -> tuple[str, str]:
        texts = [text.replace("#pragma unroll 1\n", "") for text in (helpers, body)]
        assert sum(text.count(STAGED[name]) for text in texts) == 1
        without = STAGED[name].replace(BARRIER, "")
        return texts[0].replace(STAGED[name], without), texts[1].replace(STAGED[name], without)

    assert differs(record(monkeypatch, name), order, edit)


WRONG_EPILOGUES = {
    "norm_matvec": {
        "root of the squares forgotten": in_body("static_cast<OUT>(sum * scale)", "static_cast<OUT>(sum)"),
        "norm of other columns": in_body("norm + tile", "norm + 1 + tile"),
    },
    "matvec_residual": {
        "residual forgotten": in_body(" + float(residual[element])", ""),
        "gates of another place": in_body("GATE_PITCH + GATE_AT", "GATE_PITCH"),
    },
    "expert_gate_up": {
        "shared expert reads a routed record": in_body("if (!is_shared) {\n    record", "{\n    record"),
        "root of the squares forgotten": in_body(
            "HAS_NORM ? fm_rms_scale<SIMD_GROUPS, H>(squares, EPS) : 1.0f", "1.0f"
        ),
    },
    "expert_down_combine": {
        "shared expert's gate of another column": in_body("GATE_PITCH + GATE_AT", "GATE_PITCH"),
        "shared expert forgotten": in_body("if (SHARED_EXPERT) {", "if (false) {"),
        "weights of another rank": in_body("weights[token * K + k]", "weights[token * K]"),
    },
    "gated_delta_conv_step": {
        "norm forgotten": in_body("out[r] * scale *", "out[r] *"),
        "values of another head": in_body("V_AT + key_head * V_STEP", "V_AT"),
        "beta and decay swapped": in_body("row[A_AT + gates]", "row[B_AT + gates]"),
    },
    "router_topk": {
        "not normalised": in_body("/ sum", "", 1),
        "slots without the table": in_body("HAS_TABLE ? table[expert] : expert", "expert"),
        "ranks upside down": in_body("!(value <= own)", "!(value >= own)"),
    },
    "qk_norm_rope": {
        "turned the other way": in_body("second ? turned : -turned", "second ? -turned : turned"),
        "keys with the queries' norm": in_body("is_key ? k_norm : q_norm", "q_norm"),
    },
}


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name, faults in WRONG_EPILOGUES.items() for fault in faults]
)
def test_what_is_fused_is_seen(name: str, fault: str, monkeypatch: pytest.MonkeyPatch):
    assert differs(record(monkeypatch, name), "ascending", WRONG_EPILOGUES[name][fault])


WRONG_SPACES = {
    "dequant_matvec": ("const threadgroup float* chunk_of_x", "const device float* chunk_of_x"),
    "norm_matvec": ("threadgroup float* staged = (threadgroup", "device float* staged = (threadgroup"),
    "matvec_residual": ("const device X* row_of_gate", "const threadgroup X* row_of_gate"),
    "router_topk": ("FM_THREADGROUP_ARRAY(float, best, K);", "device float* best = values;"),
    "qk_norm_rope": ("const device float* cosine", "const threadgroup float* cosine"),
    "expert_gate_up": ("threadgroup float* staged = (threadgroup", "device float* staged = (threadgroup"),
    "expert_down": ("const device uint32_t* record", "const threadgroup uint32_t* record"),
    "expert_down_combine": ("threadgroup float* own", "device float* own"),
    "gated_delta": ("device float4* state_target", "threadgroup float4* state_target"),
    "gated_delta_conv_step": ("threadgroup float* key", "device float* key"),
    "moe_combine": ("const device float4* routed", "const constant float4* routed"),
}


@pytest.mark.parametrize("name", WRONG_SPACES)
def test_a_wrong_address_space_does_not_compile(name: str, monkeypatch: pytest.MonkeyPatch):
    launch = record(monkeypatch, name)
    run(launch, "ascending")
    with pytest.raises(opencl.BuildError, match=r"address space|__(?:local|constant|global) float"):
        run(launch, "ascending", in_body(*WRONG_SPACES[name]))


EARLY_RETURNS = {
    "before the barrier": ("uint chunk = lane % LANES;", "uint chunk = lane % LANES;\nif (chunk >= H / 32) return;"),
    "before the reduction": ("float sum = fm_lane_sum", "if (lane % LANES) return;\n    float sum = fm_lane_sum"),
}  # fmt: skip


@pytest.mark.parametrize("place", EARLY_RETURNS)
def test_an_early_return_is_refused(place: str):
    """Some compilers run it and give the right sum: only the lint is sure to see it."""
    kernel = kernel_source.read_kernel("dequant_matvec")
    old, new = EARLY_RETURNS[place]
    assert kernel.body.count(old) == 1
    assert lint_body(kernel.body, kernel.inputs) == []
    faults = lint_body(kernel.body.replace(old, new), kernel.inputs)
    assert any("early return" in fault for fault in faults)


def test_an_unwritten_row_shows(monkeypatch: pytest.MonkeyPatch):
    """Outputs hold NaN before: a bound that is one too small leaves it there."""
    assert differs(record(monkeypatch, "dequant_matvec"), "ascending", in_body("row < N &&", "row + 1 < N &&"))


def test_an_unchecked_row_shows(monkeypatch: pytest.MonkeyPatch):
    """A row past the end is written behind the output."""
    launch = record(monkeypatch, "dequant_matvec")
    with pytest.raises(AssertionError, match="past the end"):
        run(launch, "ascending", in_body("row < N && first_x + m <= last_x", "true"))

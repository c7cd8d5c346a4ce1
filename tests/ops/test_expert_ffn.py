import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import ShapeError
from flash_moe_mlx.formats.expert_layout import RecordLayout, RecordPart
from flash_moe_mlx.ops.expert_ffn import expert_ffn, expert_ffn_kernel, expert_ffn_reference, plan_of

from .oracle import REFERENCE_RMS, assert_close, expert_ffn_oracle, make_bank, wide

F32, BF16, F16 = mx.float32, mx.bfloat16, mx.float16
NAMES = {F32: "f32", BF16: "bf16", F16: "f16"}

# H, I, bits and group sizes of gate, up, down, T, K, dtype of x, dtype of scales, expert biases
CASES = [
    (64, 64, (4, 4, 4), (64, 64, 64), 1, 1, F32, BF16, False),
    (256, 64, (4, 4, 4), (64, 64, 64), 1, 4, F32, BF16, False),
    (96, 160, (4, 4, 4), (32, 32, 32), 3, 3, F32, F32, False),
    (2048, 128, (4, 4, 4), (64, 64, 64), 1, 8, BF16, BF16, False),
    (128, 2176, (4, 4, 4), (128, 128, 128), 1, 3, F16, F16, False),
    (4096, 64, (4, 4, 4), (64, 64, 64), 1, 10, F32, BF16, False),
    (64, 4096, (4, 4, 4), (64, 64, 64), 1, 1, BF16, BF16, False),
    (4352, 64, (4, 4, 4), (64, 64, 64), 1, 1, F32, BF16, False),
    (256, 192, (2, 2, 2), (64, 64, 64), 1, 16, F32, BF16, False),
    (96, 96, (2, 2, 2), (32, 32, 32), 2, 3, F32, BF16, False),
    (3072, 64, (2, 2, 2), (64, 64, 64), 1, 4, BF16, BF16, False),
    (128, 1024, (2, 2, 4), (128, 128, 64), 1, 4, F32, BF16, False),
    (192, 64, (3, 3, 3), (64, 64, 64), 1, 4, F32, BF16, False),
    (64, 128, (3, 5, 6), (32, 64, 32), 1, 8, F32, F16, True),
    (320, 64, (5, 5, 5), (64, 64, 32), 2, 1, BF16, BF16, False),
    (64, 192, (6, 6, 6), (64, 64, 64), 1, 3, F16, BF16, False),
    (128, 128, (8, 8, 8), (128, 64, 32), 1, 3, F32, BF16, True),
    (128, 64, (4, 8, 4), (64, 64, 64), 1, 3, F32, BF16, False),
]


def case_id(case: tuple) -> str:
    hidden, width, bits, groups, tokens, experts, x, scales, bias = case
    named = "".join(map(str, bits)), "-".join(map(str, sorted(set(groups))))
    return (
        f"K{experts}-H{hidden}-I{width}-bits{named[0]}-G{named[1]}-T{tokens}-{NAMES[x]}-{NAMES[scales]}"
        f"{'-bias' if bias else ''}"
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_matches_the_oracle(case, kernels):
    hidden, width, bits, groups, tokens, experts, dtype, scale_dtype, bias = case
    bank, dense = make_bank(hidden, width, 5, bits, groups, dtype=scale_dtype, expert_bias=bias)
    x = mx.random.normal((tokens, hidden)).astype(dtype)
    slots = mx.random.randint(0, 5, (tokens, experts)).astype(mx.uint32)  # some repeat from K = 3 on
    y = expert_ffn_kernel(x, bank, slots)
    assert y.dtype == mx.float32
    assert_close("kernel", expert_ffn_oracle(x, dense, slots), y)
    with mx.stream(mx.cpu):
        assert_close("kernel and reference", wide(expert_ffn_reference(x, bank, slots)), y, REFERENCE_RMS)


@pytest.mark.parametrize("bits", [4, 2])
def test_pairs_do_not_see_each_other(bits: int, kernels):
    bank, _ = make_bank(128, 64, 4, (bits,) * 3, (64,) * 3)
    x = mx.random.normal((3, 128))
    slots = mx.array([[0, 1], [1, 1], [3, 0]], mx.uint32)
    together = np.array(expert_ffn_kernel(x, bank, slots))
    for token in range(3):
        for k in range(2):
            alone = expert_ffn_kernel(x[token : token + 1], bank, slots[token : token + 1, k : k + 1])
            assert np.array_equal(np.array(alone)[0, 0], together[token, k])


REFERENCE_CASES = {
    "bits4": ((4, 4, 4), (64, 64, 64), BF16, False),
    "mixed-bias": ((8, 2, 3), (32, 64, 32), F16, True),
    "unquantised-bf16": ((0, 0, 0), (0, 0, 0), BF16, False),
    "unquantised-f32-bias": ((0, 0, 0), (0, 0, 0), F32, True),
    "down-unquantised": ((4, 4, 0), (64, 64, 0), BF16, False),
}


@pytest.mark.parametrize("slots", [2, 9], ids=["S2", "S9"])
@pytest.mark.parametrize("case", REFERENCE_CASES.values(), ids=REFERENCE_CASES)
def test_reference_matches_the_oracle_and_keeps_pairs_apart(case, slots: int):
    """With two slots there are more pairs than slots, with nine fewer: the two ways of converting agree."""
    bits, groups, dtype, bias = case
    bank, dense = make_bank(128, 64, slots, bits, groups, dtype=dtype, expert_bias=bias)
    x = mx.random.normal((3, 128))
    chosen = mx.random.randint(0, slots, (3, 2)).astype(mx.uint32)
    y = expert_ffn_reference(x, bank, chosen)
    assert_close("reference", expert_ffn_oracle(x, dense, chosen), y)
    for token in range(3):
        for k in range(2):
            alone = expert_ffn_reference(x[token : token + 1], bank, chosen[token : token + 1, k : k + 1])
            assert np.array_equal(np.array(alone)[0, 0], np.array(y)[token, k])


def test_sees_bytes_written_after_the_first_call():
    bank, _ = make_bank(64, 64, 2, (4, 4, 4), (64, 64, 64), alter=False)
    x, slots = mx.random.normal((1, 64)), mx.array([[0]], mx.uint32)
    before = np.array(expert_ffn(x, bank, slots))
    bank.slot(0)[:] = bytes(bank.slot(1))
    after = np.array(expert_ffn(x, bank, slots))
    assert not np.array_equal(before, after)
    assert np.array_equal(after, np.array(expert_ffn(x, bank, mx.array([[1]], mx.uint32))))


def test_refuses_a_hidden_state_of_another_width():
    bank, _ = make_bank(64, 64, 2, (4, 4, 4), (64, 64, 64))
    with pytest.raises(ShapeError, match=r"x must be \(T, 64\)"):
        expert_ffn_kernel(mx.zeros((1, 128)), bank, mx.zeros((1, 2), mx.uint32))


def test_refuses_parts_off_their_boundaries():
    bank, _ = make_bank(64, 64, 2, (4, 4, 4), (64, 64, 64))
    layout = bank.layout
    shifted = tuple(RecordPart(p.projection, p.part, p.dtype, p.shape, p.offset + 8) for p in layout.parts)
    bank.layout = RecordLayout(shifted, layout.quantizations, layout.record_bytes)
    with pytest.raises(ShapeError, match="16-byte boundaries"):
        expert_ffn_kernel(mx.zeros((1, 64)), bank, mx.zeros((1, 2), mx.uint32))


def test_plans_go_with_their_layouts():
    bank, _ = make_bank(128, 64, 2, [4] * 3, [32] * 3)
    plan = plan_of(bank.layout)
    assert plan_of(bank.layout) is plan
    layout = weakref.ref(bank.layout)
    del bank, plan
    gc.collect()
    assert layout() is None

"""Operations hold the memory that they read by address."""

import gc

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("numba")

from flash_moe_mlx.ops.cpu import decode_tasks as tasks
from flash_moe_mlx.ops.cpu.arrays import empty
from flash_moe_mlx.ops.cpu.program import Operation, Program


def test_a_strided_array_is_held_as_a_copy() -> None:
    size = 1 << 12
    weight = mx.arange(2 * size, dtype=mx.float32).reshape(size, 2)[:, 1]
    mx.eval(weight)
    x, y = np.ones(size, np.float32), empty(size)
    operation = Operation(tasks.norm, 1, x, 0, weight, size, 0.0, y)
    expected = np.array(weight)
    for _ in range(8):  # takes the place of memory that was given back
        gc.collect()
        mx.eval(mx.full((size,), 7.0))
        np.full(size, 9.0, np.float32)
    Program([operation]).run()
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("experts", [8, 257])
@pytest.mark.parametrize("k", [1, 5])
def test_equally_probable_experts(experts: int, k: int) -> None:
    """Of equals the higher index, as mlx-lm's argpartition; here and in the prompt's router alike."""
    from flash_moe_mlx.models.moe_block import route

    rng = np.random.default_rng(experts * k)
    for _ in range(20):
        logits = rng.integers(0, 3, experts).astype(np.float32)
        ids, weights = np.zeros(k, np.int64), empty(k)
        Program([Operation(tasks.choose, 1, logits.copy(), experts, k, 1, ids, weights)]).run()
        routed, others = route(mx.array(logits)[None], k, True)
        assert ids.tolist() == np.array(routed)[0].tolist()
        assert np.allclose(weights, np.array(others)[0], rtol=1e-6)
        theirs = mx.argpartition(mx.softmax(mx.array(logits), precise=True), kth=-k)[-k:]
        assert sorted(ids.tolist()) == sorted(np.array(theirs).tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_choice_among_no_numbers(value: float) -> None:
    logits = np.zeros(16, np.float32)
    logits[3] = value
    ids, weights = np.zeros(4, np.int64), empty(4)
    Program([Operation(tasks.choose, 1, logits, 16, 4, 1, ids, weights)]).run()
    assert (ids >= 0).all() and 3 not in ids if value == float("-inf") else (ids == -1).all()

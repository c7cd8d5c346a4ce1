import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops.router_topk import router_topk_kernel, router_topk_reference

from .oracle import assert_close, wide

# T, E, further columns, K, normalise
CASES = {
    "E256-K8": (1, 256, 1, 8, True),
    "E512-K10-T3": (3, 512, 0, 10, True),
    "E16-K4-all-weights": (2, 16, 1, 4, False),
    "E300-K1": (1, 300, 5, 1, False),
    "E40-K32": (2, 40, 0, 32, True),
    "E4-K1": (1, 4, 1, 1, True),
    "E3-K3": (1, 3, 0, 3, False),
}


@pytest.mark.parametrize("has_table", [False, True], ids=["ids", "slots"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_oracle(case, has_table: bool, kernels):
    tokens, experts, more, k, normalise = case
    logits = mx.random.normal((tokens, experts + more)) * 3
    logits[:, experts:] = 100  # the columns of others
    table = mx.random.permutation(experts).astype(mx.uint32) if has_table else None
    ids, weights, slots = router_topk_kernel(logits, experts, k, normalise, table)
    own = wide(logits)[:, :experts]
    order = np.argsort(own, axis=-1, kind="stable")[:, : -k - 1 : -1]
    assert np.array_equal(np.array(ids), order)
    assert np.array_equal(np.array(slots), np.array(table)[order] if has_table else order)
    probabilities = np.exp(own - own.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    expected = np.take_along_axis(probabilities, order, -1)
    if normalise:
        expected /= expected.sum(-1, keepdims=True)
    assert_close("weights", expected, weights)
    with mx.stream(mx.cpu):
        for name, result, reference in zip(
            ("ids", "weights", "slots"), (ids, weights, slots),
            router_topk_reference(logits, experts, k, normalise, table), strict=True
        ):  # fmt: skip
            assert np.allclose(np.array(result), np.array(reference), rtol=1e-5), name


def test_of_equals_the_higher_id_comes_first(kernels):
    ids, weights, _ = router_topk_kernel(mx.array([[1.0, 2.0] * 8]), 16, 4, True, None)
    assert ids.tolist() == [[15, 13, 11, 9]]
    assert weights.tolist() == [[0.25] * 4]


def test_an_expert_that_is_not_in_memory_shows_in_the_slots(kernels):
    absent = 2**32 - 1
    table = mx.array([0, absent, 1, 2, 3, 4, 5, 6], mx.uint32)
    _, _, slots = router_topk_kernel(mx.arange(8.0)[None] * mx.array([[-1.0]]), 8, 2, True, table)
    assert slots.tolist() == [[0, absent]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("places", [slice(None), 5])
def test_logits_that_are_no_numbers_still_name_experts(places, bad: float, kernels):
    logits = mx.arange(16.0)[None] * mx.ones((1, 1))
    logits[:, places] = bad
    ids, weights, slots = router_topk_kernel(logits, 16, 4, True, mx.arange(16).astype(mx.uint32))
    assert max(ids.tolist()[0]) < 16
    assert max(slots.tolist()[0]) < 16
    assert not np.isfinite(np.array(weights)).any()

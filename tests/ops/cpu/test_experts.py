"""Experts straight on a bank's bytes, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from ..oracle import assert_close, expert_ffn_oracle, make_bank, wide

pytest.importorskip("numba")

from flash_moe_mlx.ops.cpu import experts
from flash_moe_mlx.ops.expert_batch import expert_ffn_batch, expert_ffn_batch_reference, expert_ffn_grouped
from flash_moe_mlx.ops.expert_ffn import expert_ffn, expert_ffn_reference

BANKS = {
    "4bit": {"bits": (4, 4, 4), "group_sizes": (64, 64, 64)},
    "4bit-bias": {"bits": (4, 4, 4), "group_sizes": (64, 64, 64), "expert_bias": True},
    "mixed": {"bits": (4, 3, 6), "group_sizes": (32, 64, 32), "dtype": mx.float16, "expert_bias": True},
    "down 8bit": {"bits": (4, 4, 8), "group_sizes": (64, 64, 64), "dtype": mx.float32},
    "bf16": {"bits": (0, 0, 0), "group_sizes": (0, 0, 0), "expert_bias": True},
    "f16": {"bits": (0, 0, 0), "group_sizes": (0, 0, 0), "dtype": mx.float16},
    "f32": {"bits": (0, 0, 0), "group_sizes": (0, 0, 0), "dtype": mx.float32},
}
HIDDEN, WIDTH, SLOTS = 192, 128, 6


@pytest.fixture(params=BANKS)
def stored(request: pytest.FixtureRequest):
    return make_bank(HIDDEN, WIDTH, SLOTS, **BANKS[request.param])


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 16), (3, 4), (8, 2)])
def test_pairs_match(stored, tokens, k):
    bank, dense = stored
    x = mx.random.normal((tokens, HIDDEN))
    slots = mx.random.randint(0, SLOTS, (tokens, k)).astype(mx.uint32)  # some twice
    y = expert_ffn(x, bank, slots)
    assert y.dtype == mx.float32
    assert_close("expert_ffn", expert_ffn_oracle(x, dense, slots), y)
    assert_close("expert_ffn and MLX", wide(expert_ffn_reference(x, bank, slots)), y, 1e-5)


@pytest.mark.parametrize("rows", [1, 4, 5, 9, 70, 300])
def test_batches_match(stored, rows):
    bank, dense = stored
    x = mx.random.normal((rows, HIDDEN))
    y = expert_ffn_batch(x, bank, 3)
    assert_close("expert_ffn_batch", expert_ffn_oracle(x, dense, mx.full((rows, 1), 3, mx.uint32))[:, 0], y)
    assert_close("expert_ffn_batch and MLX", wide(expert_ffn_batch_reference(x, bank, 3)), y, 1e-5)


def test_bits_of_a_pair_depend_on_no_other(stored):
    bank, _ = stored
    x = mx.random.normal((8, HIDDEN))
    slots = np.arange(32, dtype=np.uint32).reshape(8, 4) % SLOTS
    whole = np.array(expert_ffn(x, bank, mx.array(slots)))
    for token in range(8):
        for rank in range(4):
            one = expert_ffn(x[token : token + 1], bank, mx.array(slots[token : token + 1, rank : rank + 1]))
            assert np.array_equal(np.array(one)[0, 0], whole[token, rank])


def test_a_wave_matches_its_experts(stored):
    """Experts of few, some and many rows at once give the bits of each alone, and write no other pair."""
    bank, _ = stored
    k, counts = 3, [1, 4, 5, 40, 280]
    x = mx.random.normal((120, HIDDEN))
    order = np.random.default_rng(0).permutation(120 * k)
    pairs = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
    slots = [5, 0, 2, 1, 4]
    y = np.full((120 * k, HIDDEN), np.nan, np.float32)
    experts.grouped_ffn(np.array(x), bank, slots, pairs, k, y)
    assert np.isnan(y[order[sum(counts) :]]).all()
    for slot, own in zip(slots, pairs, strict=True):
        alone = expert_ffn_batch(x[mx.array(own // k)], bank, slot)
        assert np.array_equal(np.array(alone), y[own])


def test_another_activation():
    bank, _ = make_bank(HIDDEN, WIDTH, SLOTS, (4, 4, 4), (64, 64, 64))
    x, slots = mx.random.normal((2, HIDDEN)), mx.array([[0, 1], [2, 2]], mx.uint32)

    def activation(up: mx.array, gate: mx.array) -> mx.array:
        return mx.maximum(gate, 0) * (up + 1)

    expected = expert_ffn_reference(x, bank, slots, activation)
    assert_close("expert_ffn", wide(expected), expert_ffn(x, bank, slots, activation), 1e-5)
    expected = expert_ffn_batch_reference(x, bank, 1, activation)
    assert_close("expert_ffn_batch", wide(expected), expert_ffn_batch(x, bank, 1, activation), 1e-5)


def test_records_anywhere_in_memory(stored):
    """The kernels take addresses: a record copied to an odd address gives the bits of its slot."""
    bank, _ = stored
    x = np.array(mx.random.normal((1, HIDDEN)))
    nbytes = bank.layout.record_bytes
    memory = np.empty(nbytes + 1, np.uint8)
    memory[1:] = np.frombuffer(bank.slot(2), np.uint8)
    addresses = experts.part_addresses(bank.layout, np.array([memory.ctypes.data + 1]))
    y = np.empty((1, HIDDEN), np.float32)
    experts.pairs_ffn(x, np.array([0]), bank.layout, addresses, y, np.array([0]))
    assert np.array_equal(y, np.array(expert_ffn(mx.array(x), bank, mx.array([[2]], mx.uint32)))[0])


@pytest.mark.parametrize("reference", [False, True])
def test_grouped_experts_are_their_batches(stored, reference, monkeypatch):
    if reference:
        monkeypatch.setenv("FLASH_MOE_REFERENCE", "1")
    bank, _ = stored
    x, k = mx.random.normal((20, HIDDEN)), 2
    pairs = [np.arange(0, 9), np.arange(9, 12), np.arange(12, 33)]
    y = expert_ffn_grouped(mx.zeros((40, HIDDEN)), x, bank, [4, 1, 0], pairs, k)
    assert not np.array(y)[33:].any()
    for slot, own in zip([4, 1, 0], pairs, strict=True):
        assert np.array_equal(np.array(expert_ffn_batch(x[mx.array(own // k)], bank, slot)), np.array(y)[own])

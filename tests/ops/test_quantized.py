"""Experts that MLX's operations compute: the same bits one by one or together, within the scratch that is counted."""

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.formats.expert_layout import PROJECTIONS, Quantization, RecordLayout
from flash_moe_mlx.ops import quantized
from flash_moe_mlx.ops.expert_batch import expert_ffn_grouped
from flash_moe_mlx.ops.expert_ffn import expert_ffn
from flash_moe_mlx.ops.slot_memory import ExpertRecords

MODES = {"fp8": (8, 128), "mxfp8": (8, 32)}


def make(mode: str, hidden: int, width: int, slots: int) -> ExpertRecords:
    bits, group = MODES[mode]
    quantization = Quantization(bits, group, mode)
    specs = {}
    for projection in PROJECTIONS:
        rows, columns = (hidden, width) if projection == "down_proj" else (width, hidden)
        for part, spec in quantization.scheme.specs(rows, columns, bits, group, "F32").items():
            specs[projection, part] = spec
    layout = RecordLayout.contiguous(specs, dict.fromkeys(PROJECTIONS, quantization))
    rng = np.random.default_rng(0)
    records = np.zeros((slots, layout.record_bytes), np.uint8)
    for part in layout.parts:
        made = {"weight": lambda n: rng.integers(0, 120, n), "scales": lambda n: rng.integers(110, 118, n)}
        floats = np.full(part.nbytes // 4, 1e-3, np.float32).view(np.uint8)
        bytes_ = floats if part.part == "weight_scale_inv" else made[part.part](part.nbytes)
        records[:, part.offset : part.offset + part.nbytes] = bytes_
    array = mx.array(records.view(np.uint32))
    mx.eval(array)
    return ExpertRecords(layout, array)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_one_by_one(mode: str, monkeypatch: pytest.MonkeyPatch):
    bank = make(mode, 256, 128, 6)
    x = mx.random.normal((3, 256))
    slots = mx.array([[0, 5], [2, 2], [4, 1]], dtype=mx.uint32)
    together = np.array(expert_ffn(x, bank, slots))
    monkeypatch.setattr(quantized, "GATHERED_BYTES", 0)
    np.testing.assert_array_equal(np.array(expert_ffn(x, bank, slots)), together)
    pairs = [np.array([0, 3]), np.array([1]), np.array([2, 4, 5])]
    y = np.array(expert_ffn_grouped(mx.zeros((6, 256)), x, bank, [0, 2, 5], pairs, 2))
    assert np.isfinite(y).all()
    assert (np.abs(y).max(-1) > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_scratch_is_what_was_counted(mode: str, monkeypatch: pytest.MonkeyPatch):
    """Eight experts of 1024 x 512, of which a token's would hold six times as much together."""
    bank = make(mode, 1024, 512, 8)
    monkeypatch.setattr(quantized, "GATHERED_BYTES", 1 << 20)
    counted = quantized.reference_bytes(bank.layout)
    assert counted == quantized.pair_bytes(bank.layout)
    x = mx.random.normal((1, 1024))
    mx.eval(x)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(expert_ffn(x, bank, mx.array([list(range(8))], dtype=mx.uint32)))
    assert mx.get_peak_memory() - before < counted + bank.layout.record_bytes + (1 << 20)
    assert counted < 8 * bank.layout.record_bytes * 6


def test_many_rows_are_dequantised_in_tiles(monkeypatch: pytest.MonkeyPatch):
    """The same product, whatever part of the matrix is dequantised at once."""
    rng = np.random.default_rng(1)
    weight = mx.array(rng.integers(0, 120, (300, 256)).astype(np.uint8))
    parts = {"weight": weight, "weight_scale_inv": mx.array(rng.uniform(1e-3, 1e-2, (3, 2)).astype(np.float32))}
    x, how = mx.random.normal((2, 256)), Quantization(8, 128, "fp8")
    whole = np.array(quantized.product(x, parts, how))
    monkeypatch.setattr(quantized, "TILE_BYTES", 1)
    np.testing.assert_allclose(np.array(quantized.product(x, parts, how)), whole, rtol=1e-5, atol=1e-5)

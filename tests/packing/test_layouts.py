"""Packed from the layouts and forms in which models are published: the same bytes, rows in order, the same logits."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import pack, verify
from flash_moe_mlx.formats.checkpoint import Checkpoint

from ..support.hub_layouts import FOREIGN, LAYOUTS, write_layout
from ..support.models import streamed
from ..support.numerics import assert_close
from ..support.switch_models import MAX_CONTEXT

KEPT = ["gpt-oss", "Llama 4", "Mixtral", "Nemotron-H", "Kimi K2", "DeepSeek FP8", "ModelOpt NVFP4"]


@pytest.mark.parametrize("layout", KEPT)
def test_kept_as_they_are(layout: str, tmp_path: Path):
    source = write_layout(tmp_path / "source", {**LAYOUTS, **FOREIGN}[layout])
    target = tmp_path / "packed"
    pack(source, target, bits=None)
    report = verify(target, full=True, against=source)
    assert report.ok
    assert report.compared
    before, after = (
        checkpoint.layout(checkpoint.moe_layers[0]) for checkpoint in map(Checkpoint.open, (source, target))
    )
    assert not after.has_views
    assert dict(after.quantizations) == dict(before.quantizations)
    assert after.payload_bytes == before.payload_bytes
    ids = mx.array(np.random.default_rng(4).integers(0, 128, (1, 24)))
    results = []
    for path in (source, target):
        with streamed(path, max_context=MAX_CONTEXT) as model:
            results.append(np.array(model(ids).astype(mx.float32)))
    # Transposed matrices are multiplied by another operation than those with rows in order.
    assert_close("packed", *results, 1e-5 if before.has_views else 0.0)


@pytest.mark.parametrize("layout", ["gpt-oss", "DeepSeek FP8", "compressed-tensors NVFP4"])
def test_requantised(layout: str, tmp_path: Path):
    """To 8 bits, near what they were."""
    source = write_layout(tmp_path / "source", {**LAYOUTS, **FOREIGN}[layout])
    pack(source, tmp_path / "packed", bits=8, group_size=32)
    checkpoint = Checkpoint.open(tmp_path / "packed")
    quantizations = dict(checkpoint.layout(checkpoint.moe_layers[0]).quantizations)
    assert {(q.mode, q.bits) for q in quantizations.values() if q} == {("affine", 8)}
    ids = mx.array(np.random.default_rng(4).integers(0, 128, (1, 4)))
    with streamed(source, max_context=MAX_CONTEXT) as model:
        expected = np.array(model(ids).astype(mx.float32))
    with streamed(tmp_path / "packed", max_context=MAX_CONTEXT) as model:
        assert_close("requantised", expected, model(ids), 0.1)

"""Models in MLX's other quantisation modes, mixed by module, against mlx-lm's resident ones."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import pack, verify
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.expert_layout import Quantization

from ..support.models import greedy, load_resident, smallest_limit, streamed
from ..support.numerics import RELATIVE_RMS, assert_close
from ..support.switch_configs import VOCABULARY, make_config
from ..support.switch_models import CONVERSIONS, GREEDY_TOKENS, MAX_CONTEXT, compare, write_model

MODES = [name for name, how in CONVERSIONS.items() if how and how[2] != "affine"]


def mixed(path: str, _: Any) -> bool | dict[str, Any]:
    """Quantise as mlx-community's MXFP4-Q8: experts in the default mode, the rest affine; here, not the router."""
    if path.endswith("gate"):
        return False
    return True if "switch_mlp" in path or "experts" in path else {"group_size": 64, "bits": 8}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "qwen3_5_moe"])
@pytest.mark.parametrize("mode", MODES)
def test_matches_mlx_lm(model_type: str, mode: str, tmp_path: Path):
    directory = write_model(tmp_path, make_config(model_type), mode)
    bits, group_size, name = CONVERSIONS[mode] or (0, 0, "")
    layout = Checkpoint.open(directory).layout(0)
    assert {q for _, q in layout.quantizations} == {Quantization(bits, group_size, name)}
    comparison = compare(directory)
    assert comparison.rms < RELATIVE_RMS["mlx-lm"]
    assert comparison.tokens == comparison.expected
    assert comparison.misses > comparison.num_slots, "experts must have been read again"


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_5_moe"])
def test_mixed_by_module(model_type: str, tmp_path: Path):
    """Bits don't depend on the budget or on how bytes are read, packed or not."""
    directory = write_model(tmp_path / "mlx", make_config(model_type), "mxfp4", predicate=mixed)
    pack(directory, tmp_path / "packed", bits=None)
    assert verify(tmp_path / "packed", full=True, against=directory).ok
    resident = load_resident(directory)
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, 20).tolist()
    ids = mx.array(np.random.default_rng(3).integers(0, VOCABULARY, (1, 40)))
    expected, tokens = resident(ids), greedy(resident, prompt, GREEDY_TOKENS)[0]
    results = []
    few, direct = (smallest_limit(directory, max_context=MAX_CONTEXT, io=io) for io in ("pread", "direct"))
    for path, limit, io in [
        (directory, "1GB", "pread"), (directory, few, "pread"), (directory, few, "mmap"), (directory, direct, "direct"),
        (tmp_path / "packed", "1GB", "auto"),
    ]:  # fmt: skip
        with streamed(path, limit, max_context=MAX_CONTEXT, io=io) as model:
            results.append(np.array(model(ids).astype(mx.float32)))
            assert_close("logits", expected, results[-1], RELATIVE_RMS["mlx-lm"])
            assert greedy(model, prompt, GREEDY_TOKENS)[0] == tokens

    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_packed_anew(tmp_path: Path):
    """mxfp4 experts requantised to affine 8 bits are near them."""
    directory = write_model(tmp_path / "mlx", make_config("qwen3_moe"), "mxfp4")
    pack(directory, tmp_path / "packed", bits=8, group_size=32)
    assert verify(tmp_path / "packed", full=True, against=directory).ok
    ids = mx.array(np.random.default_rng(3).integers(0, VOCABULARY, (1, 40)))
    with streamed(directory, max_context=MAX_CONTEXT) as model:
        expected = np.array(model(ids).astype(mx.float32))
    with streamed(tmp_path / "packed", max_context=MAX_CONTEXT) as model:
        assert_close("requantised", expected, model(ids), 0.05)

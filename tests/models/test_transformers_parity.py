"""Logits against transformers' own Qwen3.5-MoE in float32: stored ones everywhere, live ones where PyTorch is."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import MemoryLimitError
from flash_moe_mlx.runtime.loading import load_model

from ..support.numerics import RELATIVE_RMS, assert_close

FIXTURES = Path(__file__).parents[1] / "oracle" / "fixtures"
STORED = sorted(path.name for path in FIXTURES.iterdir())
LENGTHS = (1, 7, 64, 200, 264)
TOLERANCE = RELATIVE_RMS["transformers"]

# Besides those that make_fixtures.py stores. Columns: heads, KV heads, head_dim, then GatedDeltaNet's key heads, value
# heads, key dim, value dim, then experts, K, expert width, shared width.
LIVE: dict[str, tuple[int, ...]] = {
    "a": (8, 2, 32, 2, 8, 32, 32, 32, 8, 64, 64),
    "b": (2, 1, 64, 4, 4, 16, 64, 4, 4, 32, 128),
    "c": (6, 2, 16, 3, 6, 32, 16, 64, 10, 32, 16),
    "d": (4, 4, 32, 1, 8, 64, 32, 5, 1, 96, 48),
    "e": (3, 1, 24, 2, 2, 24, 40, 17, 3, 36, 20),
    "f": (16, 2, 8, 4, 12, 8, 8, 40, 7, 16, 32),
}
LIVE_NAMES = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads", "linear_num_value_heads",
    "linear_key_head_dim", "linear_value_head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size",
)  # fmt: skip


@pytest.fixture(params=STORED)
def stored(request: pytest.FixtureRequest) -> Any:
    directory = FIXTURES / request.param
    model = load_model(directory, memory_limit="1GB")
    with model.streaming, np.load(directory / "expected.npz") as expected:
        yield model, expected["ids"], expected["logits"]


def test_there_are_six_stored_configurations_under_2_mb():
    assert len(STORED) >= 6
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*")) < 2_000_000


def test_matches_stored_logits(stored: Any):
    model, ids, logits = stored
    for length in LENGTHS:
        result = model(mx.array(ids[None, :length]))[0]
        assert_close(f"{length} tokens", logits[:length], result, TOLERANCE)


def test_matches_stored_logits_in_parts(stored: Any):
    model, ids, logits = stored
    cache = model.make_cache()
    start = 0
    for size in (64, 7, 1, 1, 120):
        result = model(mx.array(ids[None, start : start + size]), cache=cache)[0]
        assert_close(f"tokens {start} to {start + size}", logits[start : start + size], result, TOLERANCE)
        start += size


def test_matches_stored_logits_with_attention_in_blocks(stored: Any, monkeypatch: pytest.MonkeyPatch):
    model, ids, logits = stored
    monkeypatch.setattr("flash_moe_mlx.ops.attention.MAX_SCORE_BYTES", 1)  # blocks of 16 queries
    assert_close("264 tokens", logits, model(mx.array(ids[None]))[0], TOLERANCE)


def test_matches_stored_logits_from_a_few_slots(stored: Any):
    """K slots per layer: each token's experts are read for it."""
    model, ids, logits = stored
    with pytest.raises(MemoryLimitError) as refused:
        model.streaming.resize(1)
    model.streaming.resize(refused.value.smallest_limit_bytes)
    result = model(mx.array(ids[None, :64]))[0]
    assert_close("64 tokens", logits[:64], result, TOLERANCE)


def test_a_few_experts_fewer_would_be_seen(stored: Any):
    """The tolerance can fail: one expert less a token is far outside it."""
    model, ids, logits = stored
    if model.config.num_experts_per_tok == 1:
        pytest.skip("one expert a token: none to leave out")
    for layer in model.layers:
        layer.mlp.num_experts_per_tok -= 1
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close("64 tokens", logits[:64], model(mx.array(ids[None, :64]))[0], 100 * TOLERANCE)


@pytest.mark.oracle
@pytest.mark.parametrize("hub", [False, True], ids=["per-expert", "hub"])
@pytest.mark.parametrize("name", LIVE)
def test_matches_transformers(name: str, hub: bool, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'flash_moe_mlx[oracle]'")
    from ..oracle.make_fixtures import logits, make_model, save

    seed = 100 + 2 * list(LIVE).index(name) + hub
    rng = np.random.default_rng(seed)
    changes = dict(zip(LIVE_NAMES, LIVE[name], strict=True)) | {
        "vocab_size": 96,
        "hidden_size": 64,
        "tie_word_embeddings": bool(seed % 3 == 0),
        "attention_bias": bool(seed % 4 == 1),
        "linear_conv_kernel_dim": int(rng.integers(2, 6)),
    }
    oracle = make_model(changes, seed)
    dtype = [torch.bfloat16, torch.float16, torch.float32][seed % 3]
    model = load_model(save(oracle, tmp_path / "model", hub=hub, dtype=dtype), memory_limit="1GB")
    with model.streaming:
        for length in (1, 7, 64, 200):
            ids = rng.integers(0, 96, length)
            assert_close(f"{length} tokens", logits(oracle, ids), model(mx.array(ids[None]))[0], TOLERANCE)
        cache = model.make_cache()
        ids = rng.integers(0, 96, 72)
        parts = [model(mx.array(ids[None, a:b]), cache=cache)[0] for a, b in ((0, 64), (64, 71), (71, 72))]
        assert_close("64 + 7 + 1 tokens", logits(oracle, ids), mx.concatenate(parts), TOLERANCE)

"""Qwen3-Next against mlx-lm's own: conversions, the hub's layout, prompts in parts, layers without experts."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from flash_moe_mlx.errors import MissingTensorError
from flash_moe_mlx.models.qwen3_next import Model
from flash_moe_mlx.runtime.loading import load_model

from ..support.checkpoints import NORMS_MINUS_ONE
from ..support.models import greedy, load_resident, smallest_limit, streamed
from ..support.numerics import RELATIVE_RMS, assert_close
from ..support.switch_configs import EXPERTS, OURS, VOCABULARY, make_config
from ..support.switch_models import MAX_CONTEXT, conversions_of, measure, quarter_limit, write_model

TOLERANCE = RELATIVE_RMS["mlx-lm"]
SHAPES: dict[str, dict[str, Any]] = {
    "all layers with experts": {"mlp_only_layers": []},
    "every second layer": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "tied embeddings": {"tie_word_embeddings": True},
    "one key head for four values": {"linear_num_key_heads": 1},
    "another interval, no normalised weights": {"full_attention_interval": 2, "norm_topk_prob": False},
    "odd convolution, K of 1": {"linear_conv_kernel_dim": 3, "num_experts_per_tok": 1},
}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own operations, where the wiring is what is tested: kernels would be compiled for every shape."""
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "1")


@pytest.mark.parametrize("model_type", OURS)
def test_matches_mlx_lm(model_type: str, tmp_path: Path):
    """The types that have a definition of their own, as docs/models.md says of them."""
    comparisons = measure(model_type, tmp_path)
    assert len(comparisons) == len(conversions_of(model_type))
    for comparison in comparisons:
        assert comparison.rms < 1e-5
        assert comparison.tokens == comparison.expected
        assert 4 * comparison.num_slots == comparison.num_experts
        assert comparison.misses > EXPERTS


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_match_mlx_lm(shape: str, tmp_path: Path):
    directory = write_model(tmp_path, make_config("qwen3_next", **SHAPES[shape]), "4-bit g64", seed=len(shape))
    ids = mx.array(np.random.default_rng(1).integers(0, VOCABULARY, (2, 70)))
    limit = smallest_limit(directory, max_context=MAX_CONTEXT)
    with streamed(directory, limit, max_context=MAX_CONTEXT) as model:
        assert type(model) is Model
        assert_close("2 x 70 tokens", load_resident(directory)(ids), model(ids), TOLERANCE)


def test_a_prompt_in_parts_equals_one_pass(tmp_path: Path):
    directory = write_model(tmp_path, make_config("qwen3_next"), "4-bit g64")
    ids = mx.array(np.random.default_rng(2).integers(0, VOCABULARY, (2, 26)))
    with streamed(directory, quarter_limit(directory), max_context=MAX_CONTEXT) as model:
        cache = make_prompt_cache(model)
        assert all(isinstance(c, ArraysCache) for c in cache[:3])
        assert isinstance(cache[3], KVCache)
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 20), (20, 25), (25, 26))]
        assert_close("20 + 5 + 1 tokens", model(ids), mx.concatenate(parts, axis=1), RELATIVE_RMS["split"])


@pytest.mark.usefixtures("plain")
def test_fewer_experts_a_token(tmp_path: Path):
    config = make_config("qwen3_next")
    directory = write_model(tmp_path / "model", config)
    resident = load_resident(write_model(tmp_path / "fewer", config | {"num_experts_per_tok": 2}))
    with streamed(directory, max_context=MAX_CONTEXT, num_experts_per_tok=2) as model:
        assert greedy(model, [1, 2, 3], 16)[0] == greedy(resident, [1, 2, 3], 16)[0]
        assert "num_experts_per_tok=2" in model.streaming.stats().lossy[0]


def to_hub(directory: Path) -> Path:
    """Convert to transformers' form: one tensor per expert, norms minus one, convolution axes swapped, and mtp."""
    tensors = {"mtp.layers.0.mlp.experts.0.up_proj.weight": mx.zeros((2, 2))}
    for name, value in mx.load(str(directory / "model.safetensors")).items():
        stem, is_expert, projection = name.partition(".switch_mlp.")
        if is_expert:
            tensors |= {f"{stem}.experts.{i}.{projection}": part for i, part in enumerate(value)}
        elif name.endswith("conv1d.weight"):
            tensors[name] = value.moveaxis(2, 1)
        elif name.endswith(NORMS_MINUS_ONE):
            tensors[name] = (value.astype(mx.float32) - 1).astype(value.dtype)
        else:
            tensors[name] = value
    mx.save_safetensors(str(directory / "model.safetensors"), tensors)
    (directory / "model.safetensors.index.json").unlink()
    return directory


@pytest.mark.usefixtures("plain")
def test_the_hubs_layout_matches_mlx_lm(tmp_path: Path):
    """mlx-lm stacks the experts of every layer here, so every layer has some."""
    directory = to_hub(write_model(tmp_path, make_config("qwen3_next", mlp_only_layers=[])))
    ids = mx.array(np.random.default_rng(3).integers(0, VOCABULARY, (2, 40)))
    resident = load_resident(directory)
    with streamed(directory, quarter_limit(directory), max_context=MAX_CONTEXT) as model:
        # mlx-lm adds one to the norms in bfloat16, and so rounds what this reads exactly.
        assert_close("2 x 40 tokens", resident(ids), model(ids), 0.02)
    stored = mx.load(str(directory / "model.safetensors"))
    exact = {n: v.astype(mx.float32) for n, v in stored.items() if v.dtype == mx.bfloat16}
    mx.save_safetensors(str(directory / "model.safetensors"), {**stored, **exact})
    with streamed(directory, quarter_limit(directory), max_context=MAX_CONTEXT) as model:
        assert_close("in float32", load_resident(directory)(ids), model(ids), TOLERANCE)


def test_a_layer_without_its_experts_is_named(tmp_path: Path):
    directory = write_model(tmp_path, make_config("qwen3_next"))
    config = json.loads((directory / "config.json").read_text()) | {"mlp_only_layers": [0]}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingTensorError, match=r"must have 'model\.layers\.0\.mlp\.\w+_proj\.weight'"):
        load_model(directory, memory_limit="1GB")

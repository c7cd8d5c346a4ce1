"""Logits and greedy tokens against mlx-lm's resident model, on checkpoints that mlx-lm itself converted."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.models.qwen3_5_moe import Model

from ..support.models import VOCABULARY, chat_config, greedy, load_resident, make_converted, smallest_limit, streamed
from ..support.numerics import RELATIVE_RMS, assert_close

TOLERANCE = RELATIVE_RMS["mlx-lm"]


def mixed(path: str, module: Any) -> bool | dict[str, Any]:
    """Bits by module: as published mixed recipes do, experts' down_proj and the output projection get more."""
    if path.endswith(("lm_head", "embed_tokens")):
        return {"bits": 6, "group_size": 64}
    if path.endswith("switch_mlp.down_proj"):
        return {"bits": 5, "group_size": 32}
    if path.endswith("mlp.gate"):
        return False
    return not path.endswith("in_proj_a")


CONVERSIONS: dict[str, dict[str, Any]] = {
    "unquantised": {},
    **{f"{bits}-bit-g{size}": {"bits": bits, "group_size": size} for bits in (8, 4, 2) for size in (32, 64, 128)},
    "3-bit-g64": {"bits": 3},
    "mixed": {"bits": 4, "predicate": mixed},
    "4-bit-f16": {"bits": 4, "dtype": mx.float16},
    "4-bit-f32-tied": {"bits": 4, "dtype": mx.float32, "config": chat_config(tie_word_embeddings=True)},
    "4-bit-bias": {"bits": 4, "config": chat_config(attention_bias=True, linear_num_key_heads=4)},
}


@pytest.fixture(scope="module", params=CONVERSIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our model, mlx-lm's, and the directory."""
    how = CONVERSIONS[request.param]
    directory = make_converted(tmp_path_factory.mktemp("checkpoint"), seed=len(request.param), **how)
    with streamed(directory) as model:
        yield model, load_resident(directory), directory


def test_logits_match(pair: tuple[Model, Any, Path]):
    model, resident, _ = pair
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 7), (1, 100), (3, 5)):
        ids = mx.array(rng.integers(0, VOCABULARY, shape))
        assert_close(f"{shape} tokens", resident(ids), model(ids), TOLERANCE)


def test_64_greedy_tokens_match(pair: tuple[Model, Any, Path]):
    """From the fewest slots that work, so that most experts are read again for every token."""
    model, resident, directory = pair
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, 20).tolist()
    expected, lead = greedy(resident, prompt, 64)
    assert lead > 1e-4, "the reference's own choice is too close to a tie to compare"
    if not model.config.tie_word_embeddings:  # a random tied model repeats its last token
        assert len(set(expected)) > 8, "a model that repeats itself shows little"
    with streamed(directory, smallest_limit(directory)) as small:
        assert greedy(small, prompt, 64)[0] == expected
        stats = small.streaming.stats()
        assert stats.num_slots == model.config.num_experts_per_tok * len(model.layers)
        assert stats.misses > 64


def test_a_wrong_expert_would_be_seen(tmp_path: Path):
    """The tolerance can fail: two experts in each other's slots are far outside it."""
    directory = make_converted(tmp_path, bits=4)
    ids = mx.array(np.random.default_rng(2).integers(0, VOCABULARY, (1, 7)))
    with streamed(directory) as model:
        right = model(ids)
        for layer in model.streaming.debug_state().layers.values():
            (one, slot), (other, other_slot), *_ = layer.present.items()
            layer.present.update({one: other_slot, other: slot})
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close("7 tokens", right, model(ids), 100 * TOLERANCE)

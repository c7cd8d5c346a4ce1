"""mlx-lm's SwitchGLU models with streamed experts, against mlx-lm's own resident ones."""

import copy
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from ..support.models import greedy, load_resident, smallest_limit, streamed
from ..support.numerics import RELATIVE_RMS, assert_close, floats
from ..support.switch_configs import ASKED, EXPERTS, OTHERS, OURS, VOCABULARY, make_config
from ..support.switch_models import MAX_CONTEXT, measure, quarter_limit, write_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TOLERANCE = RELATIVE_RMS["mlx-lm"]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own operations, where the wiring is what is tested: kernels would be compiled for every shape."""
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "1")


@pytest.mark.parametrize("model_type", [*ASKED, *OTHERS])
def test_matches_mlx_lm(model_type: str, tmp_path: Path):
    """Logits within 1e-5 and 32 equal greedy tokens from a quarter of the experts, as docs/models.md says."""
    for comparison in measure(model_type, tmp_path):
        assert comparison.rms < 1e-5
        assert comparison.tokens == comparison.expected
        assert 4 * comparison.num_slots == comparison.num_experts
        assert comparison.misses > EXPERTS, "experts must have been read again"


def test_the_page_lists_the_types_that_are_tested():
    _, tested = PAGE.read_text().split("## What was tested\n")
    lists = re.findall(r"^(?:`\w+`, ?\n?)*`\w+`\.$", tested.partition("\n## ")[0], re.MULTILINE)
    assert [re.findall(r"`(\w+)`", names) for names in lists] == [[*OURS], [*ASKED], [*OTHERS]]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "minimax_m3_vl", "step3p5"])
def test_bit_identical_where_the_same_kernels_run(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MLX's own operations on both sides; the last three have activations of their own."""
    if mx.default_device().type == mx.DeviceType.gpu:
        pytest.skip("a GPU's kernels differ with the number of rows")
    monkeypatch.setenv("FLASH_MOE_REFERENCE", "1")
    directory = write_model(tmp_path, make_config(model_type), "4-bit g64")
    resident = load_resident(directory)
    ids = mx.array(np.random.default_rng(3).integers(0, VOCABULARY, (2, 40)))
    with streamed(directory, quarter_limit(directory), max_context=MAX_CONTEXT) as model:
        np.testing.assert_array_equal(np.array(model(ids)), np.array(resident(ids)))
        # A few tokens are computed pair by pair, with another summation order in mlx-lm's product of one row.
        assert_close("1 token", resident(ids[:1, :1]), model(ids[:1, :1]), TOLERANCE)


@pytest.mark.parametrize("model_type", ["deepseek_v32", "gpt_oss", "granitemoehybrid", "kimi_linear", "qwen3_moe"])
def test_a_prompt_in_parts_equals_one_pass(model_type: str, tmp_path: Path):
    """20 + 5 + 1 tokens: KVCache, RotatingKVCache beyond its window, ArraysCache, CacheList."""
    directory = write_model(tmp_path, make_config(model_type), "4-bit g64")
    ids = mx.array(np.random.default_rng(4).integers(0, VOCABULARY, (2, 26)))
    with streamed(directory, quarter_limit(directory), max_context=MAX_CONTEXT) as model:
        cache = make_prompt_cache(model)
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 20), (20, 25), (25, 26))]
        assert_close("20 + 5 + 1 tokens", model(ids), mx.concatenate(parts, axis=1), RELATIVE_RMS["split"])
        assert_close("batch of 2", model(ids[1:]), mx.concatenate(parts, axis=1)[1:], RELATIVE_RMS["split"])
        resident = load_resident(directory)
        assert_close("against mlx-lm", resident(ids), mx.concatenate(parts, axis=1), TOLERANCE)


def test_bits_do_not_depend_on_the_budget(tmp_path: Path):
    directory = write_model(tmp_path, make_config("glm4_moe"), "4-bit g64")
    ids = mx.array(np.random.default_rng(5).integers(0, VOCABULARY, (2, 40)))
    results = []
    for limit in (smallest_limit(directory, max_context=MAX_CONTEXT), quarter_limit(directory), "1GB"):
        with streamed(directory, limit, max_context=MAX_CONTEXT) as model:
            tokens, _ = greedy(model, ids[0, :20].tolist(), 8)
            results.append((floats(model(ids)), tokens, model.streaming.stats().num_slots))
    assert len({slots for *_, slots in results}) == 2  # K is a quarter here
    for logits, tokens, _ in results[1:]:
        np.testing.assert_array_equal(logits, results[0][0])
        assert tokens == results[0][1]


def test_a_wrong_expert_would_be_seen(tmp_path: Path):
    """The comparison can fail: two experts in each other's slots are far outside the tolerance."""
    directory = write_model(tmp_path, make_config("mixtral"), "4-bit g64")
    ids = mx.array(np.random.default_rng(6).integers(0, VOCABULARY, (1, 40)))
    with streamed(directory, max_context=MAX_CONTEXT) as model:
        right = model(ids)
        for layer in model.streaming.debug_state().layers.values():
            (one, slot), (other, other_slot), *_ = layer.present.items()
            layer.present.update({one: other_slot, other: slot})
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close("40 tokens", right, model(ids), 100 * TOLERANCE)


@pytest.mark.parametrize("model_type", [*OURS, *ASKED])
@pytest.mark.usefixtures("plain")
def test_behaves_as_mlx_lm_expects_of_a_model(model_type: str, tmp_path: Path):
    """Properties that mlx-lm's tests check: layers, type, shapes, dtypes, a batch, a cache, a deep copy."""
    config = make_config(model_type)
    text = config.get("text_config", config)
    directory = write_model(tmp_path, config)
    with streamed(directory, quarter_limit(directory), max_context=MAX_CONTEXT) as model:
        assert len(model.layers) == text["num_hidden_layers"]
        assert model.model_type in (config["model_type"], text.get("model_type"))
        prompt, pair = mx.array([[3, 1]]), mx.array([[3, 1], [4, 1]])
        expected = model(pair)
        for dtype in (mx.float16, mx.bfloat16, mx.float32):
            model.set_dtype(dtype)
            cache = make_prompt_cache(model)
            assert len(cache) == len(model.layers)
            for ids in (prompt, mx.array([[5]])):
                logits = model(ids, cache=cache)
                assert logits.shape == (1, ids.shape[1], VOCABULARY)
                assert logits.dtype == dtype
                assert mx.isfinite(logits).all()
            assert model(prompt).dtype == dtype
            assert model(pair).shape == (2, 2, VOCABULARY)
        duplicate = copy.deepcopy(model)
        model.update(tree_map(mx.zeros_like, model.parameters()))
        assert not mx.any(model(pair))
        assert_close("the copy keeps its weights and the engine", expected, duplicate(pair), 0.02)


@pytest.mark.usefixtures("plain")
def test_trace_names_the_experts(tmp_path: Path):
    directory = write_model(tmp_path / "model", make_config("mixtral"))
    with streamed(directory, max_context=MAX_CONTEXT) as model:
        with model.streaming.trace(tmp_path / "routing.npz"):
            model(mx.array([[1, 2, 3]]))
        distinct = model.streaming.stats().misses
    with np.load(tmp_path / "routing.npz") as trace:
        assert trace["experts"].shape == (3, 3, 2)
        assert sum(len(np.unique(trace["experts"][:, layer])) for layer in range(3)) == distinct
        assert np.isnan(trace["weights"]).all(), "mlx-lm's block keeps them"

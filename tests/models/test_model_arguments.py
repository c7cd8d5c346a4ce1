"""Whose fault it is that mlx-lm can't make a model: the file's, or that of versions which don't fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from mlx_lm.models import olmoe

from flash_moe_mlx import CorruptError, FlashMoEError, MissingTensorError, UnsupportedModelError, load_model

from ..support.switch_configs import make_config
from ..support.switch_models import write_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), make_config("olmoe"))


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def load_with(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    load_model(directory, memory_limit="1GB", max_context=64).streaming.close()


@pytest.mark.parametrize("error", [AttributeError("new"), TypeError("old"), AssertionError("odd"), ZeroDivisionError()])
def test_a_bug_or_another_version_is_not_blamed_on_the_file(
    error: Exception, copy: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(olmoe.Model, "__init__", broken)
    with pytest.raises(UnsupportedModelError, match=mlx_lm.__version__) as raised:
        load_with(copy)
    assert "Restore" not in str(raised.value) and raised.value.__cause__ is error


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"intermediate_size": "wide"}, CorruptError, "intermediate_size = 'wide'"),
        ({"rope_scaling": 5}, CorruptError, "rope_scaling = 5"),
        ({"num_attention_heads": 2**40}, CorruptError, "num_attention_heads must be an integer"),
        ({"num_key_value_heads": 2.5}, CorruptError, "num_key_value_heads must be an integer"),
        ({"num_hidden_layers": 10**9}, MissingTensorError, "all 1000000000 layers"),
        ({"num_experts_per_tok": 0}, CorruptError, "each token must have experts, got 0"),
        ({"num_experts_per_tok": 0.5}, CorruptError, "num_experts_per_tok must be an integer"),
    ],
)
def test_a_damaged_field_is_named(changes: dict[str, Any], kind: type[FlashMoEError], words: str, copy: Path):
    with pytest.raises(kind, match=words):
        load_with(copy, **changes)


def test_numbers_in_the_other_notation_are_good(copy: Path):
    load_with(copy, rope_theta=10000, rms_norm_eps=1e-5, max_position_embeddings=4096.0, rope_scaling=None)


def test_a_field_that_nobody_reads_may_hold_anything(copy: Path):
    load_with(copy, num_layers=10**9, n_layer="x", unknown=[[1], {"a": None}], time_step_limit=[0.0, float("inf")])

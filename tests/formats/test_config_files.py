"""config.json and generation_config.json as mlx-lm means them, and every field that is read checked."""

import json
import logging
from pathlib import Path
from typing import Any

import mlx_lm.utils
import pytest

from flash_moe_mlx import CorruptError
from flash_moe_mlx.cli.options import sampling_of
from flash_moe_mlx.formats.config_fields import GENERAL_FIELDS, HYBRID_FIELDS, MAX_DIMENSION, ROPE_FIELDS, number
from flash_moe_mlx.formats.config_files import (
    SamplingDefaults,
    check_config,
    end_tokens,
    read_config,
    sampling_defaults,
)


def write(directory: Path, config: Any, generation: Any = None) -> Path:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (directory / "generation_config.json").write_text(text)
    return directory


def test_tagged_and_plain_infinities_are_numbers(tmp_path: Path):
    """State-space models' configs have them."""
    write(tmp_path, '{"a": [0.0, Infinity], "b": {"__float__": "-Infinity"}, "c": {"__float__": "x"}}')
    config = read_config(tmp_path)
    assert config == {"a": [0.0, float("inf")], "b": float("-inf"), "c": {"__float__": "x"}}
    assert config == mlx_lm.utils.load_config(tmp_path)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [1, {"__float__": "NaN"}]}', '{"text_config": {"x": NaN}}'])
def test_nan_is_refused(text: str, tmp_path: Path):
    with pytest.raises(CorruptError, match=r"\[config.json\] must .*NaN"):
        read_config(write(tmp_path, text))


@pytest.mark.parametrize("nested", ["[" * 80 + "]" * 80, '{"a":' * 200 + "1" + "}" * 200])
def test_deep_nesting_is_refused_even_where_nobody_reads_it(nested: str, tmp_path: Path):
    with pytest.raises(CorruptError, match="64 levels"):
        read_config(write(tmp_path, f'{{"unknown": {nested}}}'))


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 0}, None, 0),  # zero is a token
        ({"eos_token_id": 0, "text_config": {"eos_token_id": 5}}, None, 0),
        ({"text_config": {"eos_token_id": 0}}, None, 0),
        ({"eos_token_id": None, "text_config": {"eos_token_id": [3]}}, None, [3]),
        ({"eos_token_id": 7}, {"eos_token_id": 0}, 0),
        ({"eos_token_id": 7}, {"eos_token_id": [1, 2]}, [1, 2]),
        ({"eos_token_id": 7}, {"eos_token_id": None}, 7),
        ({"eos_token_id": 7}, {}, 7),
        ({}, {}, None),
    ],
)
def test_end_tokens(config: dict[str, Any], generation: Any, ids: Any, tmp_path: Path):
    assert end_tokens(write(tmp_path, config, generation), config) == ids


@pytest.mark.parametrize("ids", [True, -1, 1.5, "2", {"a": 1}, [None], [[1]], 2**31])
def test_end_tokens_that_are_none(ids: Any, tmp_path: Path):
    with pytest.raises(CorruptError, match="eos_token_id must be"):
        check_config({"eos_token_id": ids})
    with pytest.raises(CorruptError, match=r"\[generation_config.json\] eos_token_id must be"):
        end_tokens(write(tmp_path, {}, {"eos_token_id": ids}), {})


def test_a_generation_config_that_is_not_json_is_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """mlx-lm ignores it as well: it only states defaults."""
    write(tmp_path, {"eos_token_id": 7}, '{"eos_token_id": 1,')
    with caplog.at_level(logging.WARNING):
        assert end_tokens(tmp_path, {"eos_token_id": 7}) == 7
    assert "generation_config.json" in caplog.text
    with pytest.raises(CorruptError, match="JSON object"):
        end_tokens(write(tmp_path, {}, "[]"), {})


@pytest.mark.parametrize("fields", [GENERAL_FIELDS, HYBRID_FIELDS, ROPE_FIELDS], ids=["general", "hybrid", "rope"])
def test_no_field_takes_nonsense(fields: Any):
    nonsense = [float("nan"), float("inf"), -(2**70), 2**70, MAX_DIMENSION + 1, 1e300, object(), b"x"]
    for field in fields:
        for value in nonsense:
            if isinstance(value, int | float) and field.kind.accepts(float(value)) and abs(value) <= 1e30:
                continue  # a finite number where numbers are meant
            assert not field.kind.accepts(value), (field.name, value)


def test_numbers_that_no_float_holds_are_compared_and_refused():
    assert not number(0, 1e30).accepts(10**400)
    assert not number(0, 1).accepts(True)
    assert number(0, 1).accepts(1) and not number(0, 1).accepts(0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "greedy"),
        ({}, "greedy"),
        ({"eos_token_id": 3}, "greedy"),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, "temperature 0.6, top-p 0.95, top-k 20"),
        ({"temperature": 0.7, "min_p": 0.05}, "temperature 0.7, min-p 0.05"),
        ({"top_k": 20}, "temperature 1, top-k 20"),
        ({"do_sample": False, "temperature": 0.6}, "greedy"),
        ({"do_sample": True, "temperature": "hot", "top_p": 7, "top_k": True}, "greedy"),
        ({"temperature": 0}, "greedy"),
    ],
)
def test_sampling_is_what_the_checkpoint_recommends(content: object, said: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert str(sampling_defaults(tmp_path)) == said


def test_options_replace_what_they_name_only():
    own = SamplingDefaults(0.6, 0.95, 20)
    assert str(sampling_of(own, None, None, None, None)) == str(own)
    assert str(sampling_of(own, 0.0, None, None, None)) == "greedy"
    assert str(sampling_of(own, 1.0, None, 0, 0.1)) == "temperature 1, top-p 0.95, min-p 0.1"

import pytest

from flash_moe_mlx.config import ModelConfig, StreamingConfig, parse_size
from flash_moe_mlx.errors import CorruptError, RequestError, UnsupportedModelError

TEXT = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (123, 123), ("123", 123), ("8GB", 8_000_000_000), ("8GiB", 8 << 30), ("8 gb", 8_000_000_000),
        ("7.5GiB", 15 << 29), ("512MB", 512_000_000), ("1K", 1000), ("1kib", 1024), (".5MB", 500_000),
        ("2T", 2 * 10**12),
    ],
)  # fmt: skip
def test_sizes(text: int | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "8 bananas", "GB", "-1GB", "1e9", "8GB8", None, True, 1.5, 0, -1, "0GB", [8]])
def test_refused_sizes(text: object) -> None:
    with pytest.raises(RequestError, match=r"\[memory_limit\]"):
        parse_size(text)  # type: ignore[arg-type]


def test_flat_and_nested_configs_are_the_same_model() -> None:
    nested = {"model_type": "qwen3_5_moe", "text_config": TEXT, "vision_config": {"hidden_size": 7}}
    assert ModelConfig.from_dict(nested) == ModelConfig.from_dict(TEXT)


def test_layer_types_follow_the_interval() -> None:
    config = ModelConfig.from_dict({**TEXT, "full_attention_interval": 3})
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [2, 5]
    stated = ModelConfig.from_dict({**TEXT, "layer_types": ["full_attention"] * 8})
    assert set(stated.layer_types) == {"full_attention"}


def test_rope_parameters_of_both_ages() -> None:
    new = ModelConfig.from_dict({**TEXT, "rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}})
    old = ModelConfig.from_dict({**TEXT, "rope_theta": 5.0, "partial_rotary_factor": 0.5})
    assert dict(new.rope_parameters) == dict(old.rope_parameters)


@pytest.mark.parametrize("name", sorted(set(TEXT) - {"model_type", "head_dim"}))
@pytest.mark.parametrize("value", [None, 0, -3, 1.5, "4", True])
def test_dimensions_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(CorruptError, match=name):
        ModelConfig.from_dict({**TEXT, name: value})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_experts_per_tok": 17}, CorruptError),
        ({"num_key_value_heads": 3}, CorruptError),
        ({"linear_num_value_heads": 3}, CorruptError),
        ({"layer_types": ["full_attention"]}, CorruptError),
        ({"layer_types": ["sliding_attention"] * 8}, UnsupportedModelError),
        ({"hidden_act": "gelu"}, UnsupportedModelError),
    ],
)
def test_impossible_models(change: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        ModelConfig.from_dict({**TEXT, **change})


def test_scratch_is_set_aside_for_no_more_than_the_context() -> None:
    assert StreamingConfig.from_arguments(None, 100, None, "auto").prefill_step_size == 100
    assert StreamingConfig.from_arguments("1GB", 10_000, None, "mmap").prefill_step_size == 2048


@pytest.mark.parametrize(
    "arguments",
    [(None, 0, None, "auto"), (None, True, None, "auto"), (None, 8, 0, "auto"), (None, 8, True, "auto"),
     (None, 8, 2.0, "auto"), (None, 8, None, "fast"), ("x", 8, None, "auto")],
)  # fmt: skip
def test_refused_arguments(arguments: tuple) -> None:
    with pytest.raises(RequestError):
        StreamingConfig.from_arguments(*arguments)

import pytest

from flash_moe_mlx.errors import CorruptError, UnsupportedModelError
from flash_moe_mlx.models.config import ModelConfig

TEXT = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip


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

"""Shapes of the models that train.py trains: the demo's, and a second one so that no conclusion rests on one model.

Both are Qwen3_5MoeForCausalLM with this folder's tokenizer and data. Widths are multiples of 64, the group that MLX's
quantisation takes by default.
"""

from __future__ import annotations

from transformers import Qwen3_5MoeTextConfig
from vocabulary import MAX_TOKENS

from packing import PAD

SHAPES: dict[str, dict[str, object]] = {
    # 8 layers, 3 GatedDeltaNet to 1 full attention; 16 routed experts, 4 per token. 9.4 million parameters.
    "demo": {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts_per_tok": 4,
        "num_experts": 16,
    },
    # 6 layers, GatedDeltaNet and full attention in turn; 64 routed experts, 8 per token. 33.1 million parameters.
    "wide": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "layer_types": ["linear_attention", "full_attention"] * 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "num_experts_per_tok": 8,
        "num_experts": 64,
    },
}


def model_config(vocab_size: int, shape: str = "demo") -> Qwen3_5MoeTextConfig:
    """Return the configuration of a shape; heads, experts and the gated shared expert are 64 wide in each."""
    return Qwen3_5MoeTextConfig(
        vocab_size=vocab_size,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=PAD,
        eos_token_id=2,
        **SHAPES[shape],
    )

"""Configs of tiny models: of our own types, of those that issue 3 names, and of mlx-lm's others."""

from typing import Any

# fmt: off
VOCABULARY = 128
EXPERTS = 16
QUARTER = EXPERTS // 4
"""Slots per layer at which models are tested; no config below picks more experts per token."""

_COMMON = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_DENSE = {"intermediate_size": 192}
_QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 64}
_ROUTED = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1,
}
_MLA = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
_YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}
_GRANITE = {
    "logits_scaling": 2.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "attention_bias": False,
}
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_proj_bias": False, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_n_groups": 1, "mamba_conv_bias": True,
}
_DELTA = {
    "head_dim": 32, "num_hidden_layers": 4, "shared_expert_intermediate_size": 64, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_BAILING = {
    **_DENSE, **_QWEN, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
}

ASKED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_DENSE, **_QWEN, "head_dim": 32, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "qwen2_moe": {**_DENSE, **_QWEN, "shared_expert_intermediate_size": 64},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 4, "intermediate_size": 64},
    "mixtral": {**_LOCAL},
    "glm4_moe": {
        **_DENSE, **_ROUTED, "head_dim": 32, "rope_scaling": None, "use_qk_norm": True, "attention_bias": True,
        "partial_rotary_factor": 0.5, "n_group": 4, "topk_group": 2,
    },
    "deepseek_v3": {**_DENSE, **_ROUTED, **_MLA, "n_group": 4, "topk_group": 2, "rope_scaling": _YARN},
    "minimax": {**_LOCAL, "shared_intermediate_size": 64, "rotary_dim": 16, "head_dim": 32},
    "ernie4_5_moe": {
        **_DENSE, "use_bias": False, "moe_num_experts": EXPERTS, "moe_k": 4, "moe_intermediate_size": 64,
        "moe_layer_start_index": 1, "moe_num_shared_experts": 1,
    },
    "bailing_moe": {**_BAILING, "use_qk_norm": True, "head_dim": 32},
    "granitemoe": {**_LOCAL, **_GRANITE, "tie_word_embeddings": True},
    "phimoe": {
        **_LOCAL,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 16,
            "long_factor": [1.5] * 16,
            "short_mscale": 1.0, "long_mscale": 1.2,
        },
        "original_max_position_embeddings": 1024,
    },
}
"""Configs by model type: those that issue 3 names."""

OURS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "text_config": {
            **_COMMON, **_QWEN, **_DELTA, "model_type": "qwen3_5_moe_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        }
    },
    "qwen3_next": {
        **_DENSE, **_QWEN, **_DELTA, "partial_rotary_factor": 0.25, "decoder_sparse_step": 1, "mlp_only_layers": [1],
    },
}
"""Configs of the types that have a definition of their own here."""

OTHERS: dict[str, dict[str, Any]] = {
    "Klear": {
        **_DENSE, **_QWEN, "attention_bias": False, "mlp_only_layers": [0], "decoder_sparse_step": 1,
        "n_shared_experts": 1,
    },
    "afmoe": {**_DENSE, **_QWEN, "head_dim": 32, "layer_types": _SLIDING, "num_dense_layers": 1, "sliding_window": 16},
    "bailing_moe_linear": {
        **_BAILING, "layer_group_size": 2, "group_norm_size": 1, "head_dim": 32, "use_qk_norm": True,
    },
    "bailing_hybrid": {
        **_BAILING, **_MLA, "layer_group_size": 3, "group_norm_size": 2, "head_dim": 32, "routed_scaling_factor": 1.5,
        "moe_shared_expert_intermediate_size": 64,
    },
    "deepseek": {**_DENSE, **_ROUTED},
    "deepseek_v2": {**_DENSE, **_ROUTED, **_MLA, "topk_method": "greedy", "rope_scaling": _YARN},
    "deepseek_v32": {
        **_DENSE, **_ROUTED, **_MLA, "rope_scaling": _YARN, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 16,
    },
    "dots1": {**_DENSE, **_ROUTED, "head_dim": 32},
    "exaone_moe": {
        **_DENSE, **_QWEN, "head_dim": 32, "num_shared_experts": 1, "sliding_window": 16, "layer_types": _SLIDING,
        "is_moe_layer": [False, True, True],
    },
    "gemma4_text": {
        **_DENSE, "num_experts": EXPERTS, "top_k_experts": 4, "moe_intermediate_size": 64, "enable_moe_block": True,
        "head_dim": 32, "global_head_dim": 32, "sliding_window": 16, "layer_types": _SLIDING,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY,
        "tie_word_embeddings": True,
    },
    "glm4_moe_lite": {**_DENSE, **_ROUTED, **_MLA, "num_key_value_heads": 4},
    "gpt_oss": {**_LOCAL, "head_dim": 32, "sliding_window": 16, "layer_types": _SLIDING},
    "granitemoehybrid": {
        **_LOCAL, **_GRANITE, **_MAMBA, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention", "mamba"],
        "tie_word_embeddings": True,
    },
    "hunyuan": {
        "intermediate_size": 64, "attention_bias": False, "moe_topk": 4, "num_experts": EXPERTS,
        "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": False,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "jamba": {
        "intermediate_size": 64, "num_experts": EXPERTS, "num_experts_per_tok": 2, "attn_layer_offset": 1,
        "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_conv": 4,
        "mamba_d_state": 16, "mamba_expand": 2, "num_hidden_layers": 4,
    },
    "kimi_linear": {
        **_DENSE, **_MLA, "head_dim": 32,
        "linear_attn_config": {
            "num_heads": 4, "head_dim": 32, "kda_layers": [1, 2], "short_conv_kernel_size": 4, "full_attn_layers": [3],
        },
        "model_max_length": 4096, "num_experts": EXPERTS, "num_experts_per_token": 4, "moe_intermediate_size": 64,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "laguna": {
        **_DENSE, **_QWEN, "head_dim": 32, "sliding_window": 16, "layer_types": _SLIDING,
        "shared_expert_intermediate_size": 64, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_heads_per_layer": [4, 4, 4],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "lfm2_moe": {
        **_DENSE, **_QWEN, "use_expert_bias": True, "num_dense_layers": 1, "norm_eps": 1e-5, "conv_bias": False,
        "conv_L_cache": 3, "layer_types": ["conv", "full_attention", "conv"],
    },
    "llama4": {
        "text_config": {
            **_COMMON, "num_hidden_layers": 4, "model_type": "llama4_text", "attention_bias": False,
            "attention_chunk_size": 64, "head_dim": 32, "interleave_moe_layer_step": 1, "intermediate_size": 64,
            "intermediate_size_mlp": 192, "num_experts_per_tok": 1, "num_local_experts": EXPERTS, "rope_scaling": None,
            "use_qk_norm": True,
        },
    },
    "longcat_flash": {
        **_MLA, "attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 192, "moe_topk": 4,
        "expert_ffn_hidden_size": 64, "n_routed_experts": EXPERTS, "zero_expert_num": 2, "num_layers": 2,
        "routed_scaling_factor": 1.0, "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "attention_bias": False,
    },
    "mellum": {
        **_DENSE, **_QWEN, "head_dim": 32, "sliding_window": 16, "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "mimo_v2_flash": {
        **_DENSE, **_ROUTED, "n_shared_experts": None, "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "sliding_window_size": 16,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "layernorm_epsilon": 1e-5, "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "head_dim": 32, "v_head_dim": 32,
        "swa_head_dim": 32, "swa_v_head_dim": 32, "partial_rotary_factor": 0.5,
    },
    "mistral4": {
        **_DENSE, **_ROUTED, **_MLA, "num_key_value_heads": 4,
        "rope_parameters": {**_YARN, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1},
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_COMMON, **_DENSE, **_QWEN, "model_type": "qwen3_moe", "head_dim": 32, "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    },
    "step3p5": {
        **_DENSE, "num_attention_groups": 2, "head_dim": 32, "sliding_window": 16, "layer_types": _SLIDING,
        "moe_num_experts": EXPERTS, "moe_top_k": 4, "moe_intermediate_size": 64, "share_expert_dim": 64,
        "moe_layers_enum": "1,2", "swiglu_limits": [0.0, 0.0, 0.5],
    },
    "solar_open": {**_DENSE, **_ROUTED, "head_dim": 32, "partial_rotary_factor": 1.0, "use_qk_norm": False},
    "glm_moe_dsa": {
        **_DENSE, **_ROUTED, **_MLA, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 16,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
        "rope_parameters": {"rope_theta": 10000.0, "type": "default"},
        "attention_bias": False,
    },
    "kimi_vl": {"text_config": {**_COMMON, **_DENSE, **_ROUTED, **_MLA}},
    "kimi_k25": {"text_config": {**_COMMON, **_DENSE, **_ROUTED, **_MLA}},
    "kimi_k3": {
        "text_config": {
            **_COMMON, **_DENSE, **_MLA, "model_type": "kimi_linear", "num_experts": EXPERTS,
            "num_experts_per_token": 4, "moe_intermediate_size": 64, "num_shared_experts": 1,
            "first_k_dense_replace": 1, "num_key_value_heads": 4,
            "linear_attn_config": {
                "num_heads": 4, "head_dim": 32, "kda_layers": [1, 2], "short_conv_kernel_size": 4,
                "full_attn_layers": [3],
            },
            "routed_expert_hidden_size": 64, "latent_moe_use_norm": True,
        },
    },
    "longcat_flash_ngram": {
        **_MLA, "zero_expert_type": "identity", "ffn_hidden_size": 192, "moe_topk": 4, "expert_ffn_hidden_size": 64,
        "n_routed_experts": EXPERTS, "zero_expert_num": 2, "num_layers": 2, "routed_scaling_factor": 1.0,
        "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    },
    "gemma4": {
        "text_config": {
            **_COMMON, **_DENSE, "model_type": "gemma4_text", "num_experts": EXPERTS, "top_k_experts": 4,
            "moe_intermediate_size": 64, "enable_moe_block": True, "head_dim": 32, "global_head_dim": 32,
            "sliding_window": 16, "layer_types": _SLIDING, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": True,
        },
        "vocab_size": VOCABULARY,
    },
    "bailing_moe_v3": {
        **_BAILING, **_MLA, "model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"],
        "layer_group_size": 3, "head_dim": 32, "routed_scaling_factor": 1.5, "moe_shared_expert_intermediate_size": 64,
        "short_conv_kernel_size": 4, "n_group": 4, "topk_group": 2,
    },
    "minimax_m3_vl": {
        "text_config": {
            **_COMMON, **_LOCAL, "model_type": "minimax_m3_vl_text", "dense_intermediate_size": 192,
            "shared_intermediate_size": 64, "head_dim": 32, "num_experts_per_tok": 4, "moe_layer_freq": [0, 1, 1],
        },
    },
}
"""Configs of mlx-lm's other types."""
# fmt: on


def make_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model."""
    own = {**OURS, **ASKED, **OTHERS}[model_type]
    common = {} if "text_config" in own else _COMMON
    return {"model_type": model_type, **common, **own, **changes}

"""Makes the stored checkpoints and their logits with transformers' own Qwen3.5-MoE. Run it as a script.

Every fixture is a directory with config.json, model.safetensors (bfloat16) and expected.npz: token ids (264,) and the
logits (264, vocabulary) that transformers computes from them in float32 with eager attention. Attention is causal, so
that the first n rows are the logits of the first n tokens. Needs PyTorch; what reads the fixtures doesn't.
"""

import argparse
import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = 264  # more than one block of 256, in which mixers work

BASE: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip

# One expert a token; all of them; 64 of which 10; a gap between the widths; biases; other rotary embeddings.
CONFIGS: dict[str, dict[str, Any]] = {
    "e4-k1": {"num_experts": 4, "num_experts_per_tok": 1, "linear_num_key_heads": 1, "linear_num_value_heads": 1},
    "e8-k2-tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "linear_num_key_heads": 4},
    "e16-k4-hub": {"num_experts": 16, "num_experts_per_tok": 4, "linear_value_head_dim": 32, "num_key_value_heads": 1},
    "e64-k10": {"num_experts": 64, "num_experts_per_tok": 10, "num_hidden_layers": 2, "full_attention_interval": 2},
    "e12-k3-bias-conv3": {
        "num_experts": 12, "num_experts_per_tok": 3, "attention_bias": True, "linear_conv_kernel_dim": 3,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "linear_key_head_dim": 8,
        "moe_intermediate_size": 20, "shared_expert_intermediate_size": 12,
    },
    "e10-k10-tied-hub": {
        "num_experts": 10, "num_experts_per_tok": 10, "tie_word_embeddings": True, "linear_conv_kernel_dim": 2,
        "full_attention_interval": 3, "num_hidden_layers": 3, "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
}  # fmt: skip


def make_model(changes: Mapping[str, Any], seed: int) -> Qwen3_5MoeForCausalLM:
    """A random model whose weights are bfloat16 numbers in float32, none of them at its initial value."""
    config = Qwen3_5MoeTextConfig(**{**BASE, **changes}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = Qwen3_5MoeForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith(("dt_bias", "A_log")):
            value = parameter + 0.5 * noise
        elif "norm" in name:
            value = parameter + 0.2 * noise  # stored minus one, but for GatedDeltaNet's own
        elif parameter.ndim == 1:
            value = 0.1 * noise
        elif "embed" in name:
            value = noise
        else:
            value = noise * parameter.shape[-1] ** -0.5
        parameter.data = value.bfloat16().float()
    return model


def logits(model: Qwen3_5MoeForCausalLM, ids: np.ndarray) -> np.ndarray:
    """float32 logits (L, vocabulary) of token ids (L,)."""
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()


def save(model: Qwen3_5MoeForCausalLM, directory: Path, *, hub: bool, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the checkpoint in the form of transformers, one tensor per expert, or of the hub, fused and wrapped."""
    shutil.rmtree(directory, ignore_errors=True)
    model = copy.deepcopy(model).to(dtype)  # a copy: rotary frequencies would be rounded too
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if not hub:
        return directory
    saved = load_file(directory / "model.safetensors")
    tensors = {}
    for name, value in model.state_dict().items():  # in memory experts are fused
        if name in saved or ".experts." in name:
            tensors[name.replace("model.", "model.language_model.", 1)] = value.contiguous()
    # What text generation skips.
    tensors["model.visual.patch_embed.proj.bias"] = torch.ones(4, dtype=dtype)
    tensors["mtp.layers.0.mlp.experts.down_proj"] = torch.ones(2, 4, 4, dtype=dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((directory / "config.json").read_text())
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"depth": 1},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIXTURES)
    out = parser.parse_args().out
    for seed, (name, changes) in enumerate(CONFIGS.items()):
        model = make_model(changes, seed)
        ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, TOKENS).astype(np.uint16)
        expected = logits(model, ids)
        directory = save(model, out / name, hub=name.endswith("hub"))
        np.savez_compressed(directory / "expected.npz", ids=ids, logits=expected)
        print(name, sum(p.numel() for p in model.parameters()), "parameters")


if __name__ == "__main__":
    main()

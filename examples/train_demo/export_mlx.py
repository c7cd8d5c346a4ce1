"""Turn the bf16 checkpoint into the stock 4-bit MLX form that the package embeds.

    python export_mlx.py checkpoint ../../src/flash_moe_mlx/demo

transformers 5 writes one tensor an expert, which mlx-lm cannot load: the experts are stacked as the hub's checkpoints
have them first, then mlx_lm.convert does the rest. Routers and shared-expert gates stay at 8 bits, as mlx-lm has it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm import convert

DROPPED = ("README.md", "generation_config.json", "model.safetensors.index.json")


MLX_LM_INTERVAL = 4  # layers from one with full attention to the next, where config.json doesn't say


def fuse_experts(source: Path, destination: Path) -> None:
    """Copy a checkpoint with each layer's experts stacked into ``experts.gate_up_proj`` and ``experts.down_proj``."""
    config = json.loads((source / "config.json").read_text())
    weights = mx.load(str(source / "model.safetensors"))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.gate_proj.weight" not in weights:
            continue
        stacks = {
            part: mx.stack([weights.pop(f"{prefix}.{e}.{part}.weight") for e in range(config["num_experts"])])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        weights[f"{prefix}.gate_up_proj"] = mx.concatenate([stacks["gate_proj"], stacks["up_proj"]], axis=1)
        weights[f"{prefix}.down_proj"] = stacks["down_proj"]
    config["model_type"] = "qwen3_5_moe"
    interval = config["layer_types"].index("full_attention") + 1
    if interval != MLX_LM_INTERVAL:
        config["full_attention_interval"] = interval  # mlx-lm doesn't read layer_types
    destination.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja" or file.name == "generation_config.json":
            shutil.copy(file, destination)
    mx.save_safetensors(str(destination / "model.safetensors"), weights, metadata={"format": "pt"})
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def export(source: Path, destination: Path, *, bits: int = 4, group_size: int = 64) -> None:
    """Fuse, convert, and replace the earlier result."""
    with tempfile.TemporaryDirectory() as folder:
        fused, converted = Path(folder) / "fused", Path(folder) / "converted"
        fuse_experts(source, fused)
        convert(str(fused), str(converted), quantize=True, q_bits=bits, q_group_size=group_size, dtype="bfloat16")
        destination.mkdir(parents=True, exist_ok=True)
        for file in converted.iterdir():
            if file.name not in DROPPED:
                shutil.copyfile(file, destination / file.name)


def main() -> None:
    """Export a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    options = parser.parse_args()
    export(options.source, options.destination)
    for file in sorted(options.destination.iterdir()):
        print(f"{file.stat().st_size:10,} {file.name}")


if __name__ == "__main__":
    main()

"""The cells of the table: how a cell's experts are stored and run, and the checkpoints that they are read from."""

import importlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import convert

from flash_moe_mlx import pack

SCRIPTS = Path(__file__).parents[2] / "examples" / "train_demo"
MICROSCALED = {"mxfp4": 32, "nvfp4": 16}


@dataclass(frozen=True)
class Storage:
    """How the routed experts of a checkpoint are stored; everything else stays in bfloat16.

    Attributes:
        bits: Bits per weight; 16 leaves the experts in bfloat16, 0 makes all their weights zero: the answers of a model
            without them.
        group_size: Weights that share a scale.
        down_bits: Bits of down_proj, if they are others.
        layer_bits: Bits of the layers that have others.
        mode: Mode of MLX's quantisation.
    """

    bits: int
    group_size: int = 64
    down_bits: int | None = None
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    mode: str = "affine"

    @property
    def name(self) -> str:
        if self.mode != "affine":
            return self.mode
        down = "" if self.down_bits is None else f"-down{self.down_bits}"
        layers = "".join(f"-L{layer}b{bits}" for layer, bits in self.layer_bits.items())
        return {16: "16", 0: "none"}.get(self.bits) or f"{self.bits}g{self.group_size}{down}{layers}"

    def write(self, source: Path, folder: Path) -> Path:
        """Write the checkpoint into ``folder`` unless it is there, and return its directory.

        Args:
            source: The bfloat16 checkpoint, as train.py writes it.
            folder: Directory of all checkpoints of this model.
        """
        fused, place = folder / "16", folder / self.name
        if not fused.exists():
            _fuse(source, _clean(folder / "16.part")).rename(fused)
        if place.exists():
            return place
        part = _clean(folder / f"{self.name}.part")
        if self.bits == 0:
            _empty(fused, part)
        elif self.mode == "affine":
            pack(
                fused, part, bits=self.bits, group_size=self.group_size, down_bits=self.down_bits,
                layer_bits=self.layer_bits or None, dense="keep", progress=False,
            )  # fmt: skip
        else:
            settings = {"bits": self.bits, "group_size": self.group_size, "mode": self.mode}
            convert(
                str(fused), str(part), quantize=True, q_bits=self.bits, q_group_size=self.group_size, q_mode=self.mode,
                quant_predicate=lambda path, *_: settings if "switch_mlp" in path else False,
            )  # fmt: skip
        return part.rename(place)

    def expert_bytes(self, config: Mapping[str, Any]) -> float:
        """Return the mean size of one expert over the layers, in bytes, scales and biases included."""
        weights = config["hidden_size"] * config["moe_intermediate_size"]
        layers = config["num_hidden_layers"]
        total = 0.0
        for layer in range(layers):
            bits = self.layer_bits.get(layer)
            for projection in ("gate", "up", "down"):
                own = bits or (self.down_bits if projection == "down" else None) or self.bits
                total += weights * (own + self._scale_bits) / 8
        return total / layers

    @property
    def _scale_bits(self) -> float:
        """Bits per weight that scales and biases take: bfloat16 both, or one byte."""
        if self.bits in (0, 16):
            return 0
        return (32 if self.mode == "affine" else 8) / self.group_size


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        storage: How the experts are stored.
        experts_per_token: The router's K; None is the model's own.
        activation_bits: 8 rounds activations of decode steps, as ``load`` does it; None is exact.
        schema: Whether tool calls are bound to the tools' schemas.
    """

    storage: Storage
    experts_per_token: int | None = None
    activation_bits: int | None = None
    schema: bool = False

    @property
    def name(self) -> str:
        k = "" if self.experts_per_token is None else f"-K{self.experts_per_token}"
        activations = "" if self.activation_bits is None else f"-a{self.activation_bits}"
        return f"{self.storage.name}{k}{activations}{'-schema' if self.schema else ''}"

    def bytes_per_token(self, config: Mapping[str, Any]) -> int:
        """Return the bytes of the experts that a token picks in all layers: what it reads if none is in memory."""
        k = self.experts_per_token or config["num_experts_per_tok"]
        return round(k * config["num_hidden_layers"] * self.storage.expert_bytes(config))


def cells(own_k: int, layers: int) -> list[Cell]:
    """Return the cells in the order of their importance, for a model with these layers and K."""
    bits = [Cell(Storage(b)) for b in (16, 4, 2, 0, 3, 8, 6, 5)]
    schema = [Cell(Storage(b), schema=True) for b in (2, 4)]
    ks = [Cell(Storage(b), k) for b in (4, 2) for k in range(1, 9) if k != own_k]
    down = [Cell(Storage(2, down_bits=6)), Cell(Storage(3, down_bits=6)), Cell(Storage(2, down_bits=4))]
    first, last = range(layers // 2), range(layers // 2, layers)
    by_layer = [Cell(Storage(2, layer_bits=dict.fromkeys(part, 4))) for part in (first, last)]
    groups = [Cell(Storage(2, 32)), Cell(Storage(4, 32))]
    modes = [Cell(Storage(4, size, mode=mode)) for mode, size in MICROSCALED.items()]
    activations = [Cell(Storage(4), activation_bits=8)]  # the CPU kernels round them for 4-bit weights only
    more = [Cell(Storage(16), schema=True), Cell(Storage(3), schema=True), Cell(Storage(2), 1, schema=True)]
    return [*bits, *schema, *down, *groups, *ks[1:4], *ks[8:11], *by_layer, *modes, *activations, *more,
            *(k for k in ks if k not in (*ks[1:4], *ks[8:11]))]  # fmt: skip


def read_config(source: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint."""
    return json.loads((source / "config.json").read_text())


def train_demo(module: str) -> Any:
    """Import a script of examples/train_demo, which import each other by bare name."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))


def _clean(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _fuse(source: Path, place: Path) -> Path:
    train_demo("export_mlx").fuse_experts(source, place)
    return place


def _empty(source: Path, place: Path) -> None:
    """Copy a checkpoint with zeros for its routed experts."""
    shutil.copytree(source, place)
    weights = mx.load(str(source / "model.safetensors"))
    weights |= {name: mx.zeros_like(weight) for name, weight in weights.items() if ".mlp.experts." in name}
    mx.save_safetensors(str(place / "model.safetensors"), weights, metadata={"format": "pt"})

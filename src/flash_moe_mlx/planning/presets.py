"""Models that people use, known without a network: repositories, their dimensions, and what follows from them.

``presets.json`` holds what config.json and the conversion say, dimensions and bits, and the figures that
preset_figures.py derives from them. A preset's headers can be written to a folder as a checkpoint whose data are holes,
which plan() then reads like any other. Sizes are of the language model, without vision towers.
"""

import json
import math
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import RequestError

GROUP_SIZE = 64
CONTEXT = 8192
"""Tokens of context that the smallest limits have room for."""


@dataclass(frozen=True)
class Figures:
    """Figures of a model that follow from its headers.

    Attributes:
        checkpoint_bytes: Size of the language model's files, which is what a download takes at least.
        dense_bytes: Size of everything but the routed experts.
        cpu_limit_bytes: Smallest memory limit that works with `CONTEXT` tokens on a CPU, in float32.
        gpu_limit_bytes: The same on a GPU that shares the machine's memory, in the checkpoint's dtype.
        record_bytes: Size of an expert.
        layers: Number of layers with experts.
        num_experts: E.
        num_experts_per_tok: K.
        token_bytes: Bytes of weights and states that a decoded token passes over.
        shared_bytes: Part of them that belongs to shared experts.
    """

    checkpoint_bytes: int
    dense_bytes: int
    cpu_limit_bytes: int
    gpu_limit_bytes: int
    record_bytes: int
    layers: int
    num_experts: int
    num_experts_per_tok: int
    token_bytes: int
    shared_bytes: int

    def smallest_limit_bytes(self, backend: str) -> int:
        """Return the smallest limit on "cpu", or on another backend."""
        return self.cpu_limit_bytes if backend == "cpu" else self.gpu_limit_bytes

    def slots(self, limit_bytes: int, backend: str) -> int:
        """Return the number of slots per layer within a limit that works."""
        more = (limit_bytes - self.smallest_limit_bytes(backend)) // (self.record_bytes * self.layers)
        return min(self.num_experts, self.num_experts_per_tok + max(more, 0))


@dataclass(frozen=True)
class Preset:
    """A model on the hub that is known by a short name.

    Attributes:
        name: Short name, such as "qwen3.5-35b-4bit".
        repository: Name on the hub.
        experts: How its experts are stored, such as "4-bit".
        bits: Bits of its other matrices.
        config: What decides in its config.json.
        figures: What follows from it.
    """

    name: str
    repository: str
    experts: str
    bits: int
    config: dict[str, Any]
    figures: Figures


@cache
def presets() -> tuple[Preset, ...]:
    """Return all presets, by family and size."""
    entries = json.loads((files(__package__) / "presets.json").read_text())
    return tuple(Preset(**{**entry, "figures": Figures(**entry["figures"])}) for entry in entries)


def find(name: str) -> Preset | None:
    """Return the preset of a short name or repository, or None."""
    return next((preset for preset in presets() if name in (preset.name, preset.repository)), None)


def repository_of(name: str) -> str:
    """Return the repository that a preset's short name stands for; any other name as it is."""
    preset = None if "/" in name else find(name)
    return name if preset is None else preset.repository


def require(name: str) -> Preset:
    """Return the preset of a name.

    Raises:
        RequestError: If there is none.
    """
    preset = find(name)
    if preset is None:
        raise RequestError(f"[models] {name} is no model that this package knows. flash-moe models lists them.")
    return preset


def write_headers(config: dict[str, Any], bits: int, directory: Path) -> None:
    """Write a checkpoint as mlx-lm converts it, with holes in place of its data: no disk space, no network.

    Args:
        config: What decides in config.json.
        bits: Bits of affine quantisation; experts that the model's own config stores as mxfp4 stay that.
        directory: Empty directory.
    """
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes, quantize_model

    config = json.loads(json.dumps(config))
    text = config.get("text_config", config)
    if text["model_type"].startswith("qwen3_5"):
        kinds = ("linear_attention", "full_attention")
        text["layer_types"] = [kinds[(i + 1) % 4 == 0] for i in range(text["num_hidden_layers"])]
    model_class, arguments = _get_classes(config)
    # Parameters stay lazy: shapes and dtypes are all it takes.
    with redirect_stdout(StringIO()):  # it prints
        model, config = quantize_model(
            model_class(arguments.from_dict(config)), config, GROUP_SIZE, bits, quant_predicate=_predicate(config)
        )
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, dtype, shape, nbytes in _tensors(tree_flatten(model.parameters())):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    data = json.dumps(header).encode()
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + offset)


def _predicate(config: dict[str, Any]) -> Any:
    """Return mlx-lm's choice per module for models whose experts are published as mxfp4, or None for its own."""
    if config["model_type"] != "gpt_oss":
        return None

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        if ".experts." in path:
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        return not path.endswith("router") and hasattr(module, "to_quantized")

    return choose


def _tensors(parameters: list[tuple[str, Any]]) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    names = {"uint32": ("U32", 4), "uint8": ("U8", 1)}
    for name, value in parameters:
        dtype, size = names.get(str(value.dtype).rpartition(".")[2], ("BF16", 2))
        yield name, dtype, value.shape, size * math.prod(value.shape)

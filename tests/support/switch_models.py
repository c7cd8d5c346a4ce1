"""Tiny models of every mlx-lm type whose experts are a SwitchGLU, converted by mlx-lm's own functions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_map

from .models import greedy, load_resident, smallest_limit, streamed
from .numerics import relative_rms
from .switch_configs import OTHERS, QUARTER, VOCABULARY, make_config

CONVERSIONS: dict[str, tuple[int, int, str] | None] = {
    "unquantised": None, "4-bit g64": (4, 64, "affine"), "8-bit g32": (8, 32, "affine"),
    "mxfp4": (4, 32, "mxfp4"), "mxfp8": (8, 32, "mxfp8"), "nvfp4": (4, 16, "nvfp4"),
}  # fmt: skip
GREEDY_TOKENS = 32
MAX_CONTEXT = 512


def _random(value: mx.array) -> mx.array:
    """Weights of a scale at which routing is decided and every layer matters; some are zeros in mlx-lm's model."""
    if value.ndim < 2:
        return value + 0.1 * mx.random.normal(value.shape)
    if float(value.astype(mx.float32).abs().max()) == 0:
        return mx.random.normal(value.shape) / math.sqrt(value.shape[-1])
    return 1.5 * value


def make_resident(config: dict[str, Any], seed: int = 0) -> Any:
    """mlx-lm's own model with random weights, bfloat16."""
    model_class, args_class = mlx_lm.utils._get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    model.update(tree_map(_random, model.parameters()))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def write_model(
    directory: Path,
    config: dict[str, Any],
    conversion: str = "unquantised",
    seed: int = 0,
    predicate: Callable[[str, Any], bool | dict[str, Any]] | None = None,
) -> Path:
    """A checkpoint as mlx_lm.convert writes it; ``predicate`` chooses modes by module."""
    model, quantisation = make_resident(config, seed), CONVERSIONS[conversion]
    if quantisation is not None:
        bits, group_size, mode = quantisation
        model, config = mlx_lm.utils.quantize_model(
            model, dict(config), group_size, bits, mode=mode, quant_predicate=predicate
        )
    mlx_lm.utils.save_model(directory, model)
    mlx_lm.utils.save_config(dict(config), directory / "config.json")
    return directory


def quarter_limit(directory: Path) -> int:
    """The limit at which every layer has slots for a quarter of its experts."""
    with streamed(directory, "1GB", max_context=MAX_CONTEXT) as model:
        demand = model.streaming.debug_state().demand
        spare = QUARTER - demand.num_experts_per_tok
        records = sum(spare * layout.record_bytes for layout in demand.layouts.values())
    return smallest_limit(directory, max_context=MAX_CONTEXT) + records


@dataclass(frozen=True)
class Comparison:
    """A streamed model next to mlx-lm's resident one.

    Attributes:
        rms: Largest relative RMS of float32 logits, over passes of 1, 7 and 2 x 40 tokens.
        expected: mlx-lm's greedy tokens.
        tokens: Ours.
        num_experts_per_tok: K.
        num_slots: Slots of all layers.
        num_experts: Experts of all layers.
        misses: Experts read.
    """

    rms: float
    expected: tuple[int, ...]
    tokens: tuple[int, ...]
    num_experts_per_tok: int
    num_slots: int
    num_experts: int
    misses: int


def compare(directory: Path) -> Comparison:
    """Stream a checkpoint at a quarter of its experts, and run it resident."""
    resident = load_resident(directory)
    rng = np.random.default_rng(0)
    with streamed(directory, quarter_limit(directory), max_context=MAX_CONTEXT) as model:
        passes = [mx.array(rng.integers(0, VOCABULARY, shape)) for shape in ((1, 1), (1, 7), (2, 40))]
        rms = max(relative_rms(model(ids), resident(ids)) for ids in passes)
        prompt = rng.integers(0, VOCABULARY, 20).tolist()
        stats = model.streaming.stats()
        return Comparison(
            rms,
            tuple(greedy(resident, prompt, GREEDY_TOKENS)[0]),
            tuple(greedy(model, prompt, GREEDY_TOKENS)[0]),
            model.streaming.debug_state().demand.num_experts_per_tok,
            stats.num_slots,
            stats.num_experts,
            model.streaming.stats().misses,
        )


def conversions_of(model_type: str) -> list[str]:
    """Return the conversions in which a type is tested: all for the required types, two for the others."""
    affine = [name for name, how in CONVERSIONS.items() if how is None or how[2] == "affine"]
    return [name for name in affine if model_type not in OTHERS or name != "8-bit g32"]


def measure(model_type: str, directory: Path) -> list[Comparison]:
    """Convert and compare one type, in each of its conversions."""
    config = make_config(model_type)
    return [
        compare(write_model(directory / name.replace(" ", "-"), config, name)) for name in conversions_of(model_type)
    ]

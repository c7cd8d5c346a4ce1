"""Predicts tokens per second from measurable parts: weight throughput, time per layer call, disk reads."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx.utils import tree_flatten

from ..formats.checkpoint import Checkpoint
from ..models.spec import ModelSpec
from ..ops.dequant_matvec import dequant_matvec
from ..runtime.loading import load_model

_ROWS, _COLUMNS, _BITS, _GROUP_SIZE = 16384, 4096, 4, 64  # 38 MB: more than most processor caches hold
_MATRICES = 4
_STEPS = 24


@dataclass(frozen=True)
class Speed:
    """Speed of a machine, from which a token's time follows.

    Attributes:
        weight_bytes_per_second: Throughput of products with quantised weights.
        layer_seconds: Time of a layer besides its weights: calls, norms, small products.
        disk_bytes_per_second: Random-read rate for records; None if unknown.
        overlap: Share of the time of a layer's shared and cached experts that overlaps reads, 0 to 1.
    """

    weight_bytes_per_second: float
    layer_seconds: float
    disk_bytes_per_second: float | None = None
    overlap: float = 1.0

    def token_seconds(self, work: "TokenWork", missed_bytes: float) -> float | None:
        """Return the seconds per decoded token; None if reads are needed and the disk's rate is unknown."""
        computing = work.weight_bytes / self.weight_bytes_per_second + work.layers * self.layer_seconds
        if not missed_bytes:
            return computing
        if not self.disk_bytes_per_second:  # a delayed probe may have read nothing
            return None
        meanwhile = (work.shared_bytes + work.expert_bytes - missed_bytes) / self.weight_bytes_per_second
        return computing + max(missed_bytes / self.disk_bytes_per_second - self.overlap * meanwhile, 0.0)


@dataclass(frozen=True)
class TokenWork:
    """Work of one decoded token of a model.

    Attributes:
        layers: Number of decoder layers.
        weight_bytes: Bytes of dense weights, K experts per layer, and recurrent states (read and written).
        expert_bytes: Part of them that belongs to routed experts.
        shared_bytes: Part of them that belongs to shared experts.
    """

    layers: int
    weight_bytes: int
    expert_bytes: int
    shared_bytes: int

    def with_expert_bytes(self, expert_bytes: int) -> "TokenWork":
        """Return the work of a host that computes only some of the routed experts."""
        weight_bytes = self.weight_bytes - self.expert_bytes + expert_bytes
        return TokenWork(self.layers, weight_bytes, expert_bytes, self.shared_bytes)

    @classmethod
    def of(cls, checkpoint: Checkpoint, spec: ModelSpec) -> "TokenWork":
        """Determine a model's work from its headers only."""
        names = {name for name in spec.weights if "embed_tokens" in name}
        # A token reads one row of the embeddings, unless they are also the output projection.
        tied = not any("lm_head" in name for name in spec.weights)
        skipped = 0 if tied else sum(spec.weights[name].nbytes for name in names)
        experts = sum(
            min(spec.num_experts_per_tok, checkpoint.num_experts(layer)) * checkpoint.layout(layer).payload_bytes
            for layer in checkpoint.moe_layers
        )
        states = 2 * spec.footprint.state_bytes(1, 1)
        layers = checkpoint.setting("num_hidden_layers") or len(checkpoint.moe_layers)
        shared = sum(value.nbytes for name, value in spec.weights.items() if ".shared_expert" in name)
        return cls(layers, spec.footprint.dense_bytes - skipped + experts + states, experts, shared)


def measure_speed(disk_bytes_per_second: float | None = None) -> Speed:
    """Measure this machine for a few seconds: large quantised products, and the embedded model's layers.

    Args:
        disk_bytes_per_second: Measured or stated read rate of the disk.
    """
    rate = _weight_rate()
    return Speed(rate, _layer_seconds(rate), disk_bytes_per_second)


def busy_note() -> str | None:
    """Return a sentence about other programs' load, if it makes what `measure_speed` finds too low."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return None
    return f"The load was {load:.1f} on {cores} cores when this machine was measured: idle, it is faster."


def _weight_rate() -> float:
    weights = [
        mx.random.randint(0, 1 << 31, (_ROWS, _COLUMNS * _BITS // 32)).astype(mx.uint32) for _ in range(_MATRICES)
    ]
    scales = mx.full((_ROWS, _COLUMNS // _GROUP_SIZE), 0.01, dtype=mx.bfloat16)
    x = mx.ones((1, _COLUMNS))
    mx.eval(weights, scales, x)

    def products() -> None:
        for weight in weights:
            mx.eval(dequant_matvec(x, weight, scales, scales, bits=_BITS, group_size=_GROUP_SIZE))

    nbytes = _MATRICES * (weights[0].nbytes + 2 * scales.nbytes)
    return nbytes / _median_seconds(products, 7)


def _layer_seconds(weight_bytes_per_second: float) -> float:
    """Return the seconds per layer of the embedded model, whose weights are so few that calls dominate."""
    model = load_model(Path(str(files("flash_moe_mlx") / "demo")), memory_limit="200MB", max_context=256)
    with model.streaming:
        cache, token = model.make_cache(), mx.array([[5]])

        def step() -> None:
            nonlocal token
            token = model(token, cache=cache)[:, -1:].argmax(-1)
            mx.eval(token)

        seconds = _median_seconds(step, _STEPS)
        nbytes = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
        return max(seconds - nbytes / weight_bytes_per_second, 0.0) / len(model.layers)


def _median_seconds(run: Callable[[], None], times: int) -> float:
    run()  # compiles
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return median(seconds)

"""Figures of presets: those that their headers give, and the speed that follows from them."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .planner import Planner, local_hit_rate
from .presets import CONTEXT, Figures, write_headers
from .speed import Speed, TokenWork


def expect(figures: Figures, slots: int, speed: Speed) -> tuple[float, float | None]:
    """Return the hit rate and the tokens per second that local routing gives with this many slots per layer."""
    hit_rate = local_hit_rate(figures.num_experts, figures.num_experts_per_tok, slots)
    asked_bytes = figures.layers * figures.num_experts_per_tok * figures.record_bytes
    work = TokenWork(figures.layers, figures.token_bytes, asked_bytes, figures.shared_bytes)
    seconds = speed.token_seconds(work, (1 - hit_rate) * asked_bytes)
    return hit_rate, None if seconds is None else 1 / seconds


def measure(config: dict[str, Any], bits: int, directory: Path, on_gpu: Callable[[], None]) -> dict[str, int]:
    """Return the figures of a preset, from headers that are written to an empty directory.

    Args:
        config: What decides in config.json.
        bits: Bits of affine quantisation.
        directory: Empty directory.
        on_gpu: Function that makes the library plan as on a GPU from then on.
    """
    write_headers(config, bits, directory)
    speed = Speed(1e10, 1e-3, 1e9)
    planner = Planner.open(directory, memory_limit="1TB", max_context=CONTEXT, speed=speed)
    on_gpu()
    gpu_limit_bytes = Planner.open(directory, memory_limit="1TB", max_context=CONTEXT, speed=speed).smallest_limit_bytes
    (record_bytes,) = set(planner.record_bytes.values())
    (num_experts,) = set(planner.num_experts.values())
    checkpoint_bytes = (directory / "model.safetensors").stat().st_size
    return asdict(
        Figures(
            checkpoint_bytes=checkpoint_bytes,
            dense_bytes=checkpoint_bytes - planner.expert_bytes,
            cpu_limit_bytes=planner.smallest_limit_bytes,
            gpu_limit_bytes=gpu_limit_bytes,
            record_bytes=record_bytes,
            layers=len(planner.num_experts),
            num_experts=num_experts,
            num_experts_per_tok=planner.k,
            token_bytes=planner.work.weight_bytes,
            shared_bytes=planner.work.shared_bytes,
        )
    )

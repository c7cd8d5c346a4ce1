"""Skips what this machine can't run, and says why."""

from importlib.util import find_spec

import hypothesis
import pytest


def _has_gpu() -> bool:
    import mlx.core as mx

    return mx.metal.is_available() or (hasattr(mx, "cuda") and mx.cuda.is_available())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutations", type=int, default=0, help="mutations of each checkpoint's JSON files; few without")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without = {}
    if find_spec("torch") is None:
        without["oracle"] = "needs PyTorch: pip install 'flash_moe_mlx[oracle]'"
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        without["gpu"] = "needs a Metal or CUDA device"
    for item in items:
        for marker, reason in without.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


hypothesis.settings.register_profile("fuzz", max_examples=25_000, deadline=None)  # --hypothesis-profile=fuzz

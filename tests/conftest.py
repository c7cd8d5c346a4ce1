"""Skips what this machine can't run, and says why. Tests compute on the CPU unless they are about a GPU."""

import gc
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest


def _has_gpu() -> bool:
    import mlx.core as mx

    return mx.metal.is_available() or (hasattr(mx, "cuda") and mx.cuda.is_available())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutations", type=int, default=0, help="mutations of each checkpoint's JSON files; few without")
    parser.addoption("--every-fault", action="store_true", help="each fault at every operation, not at three")
    parser.addoption("--generations", type=int, default=12, help="generations in each way of calling, memory watched")


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


_LAST_FILE = pytest.StashKey[Path]()


def _keep_out_of_collections(item: pytest.Item) -> None:
    """Freeze what there is before each file of tests: thousands of tests, modules, numba's types.

    A collection that the library or a test asks for took over a second with them, and some ask for dozens.
    """
    if item.path != item.session.stash.get(_LAST_FILE, None):
        item.session.stash[_LAST_FILE] = item.path
        gc.collect()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Choose MLX's default device before the test's fixtures run, those of its module included.

    References, tolerances and sizes are those of float32 on the CPU, also where MLX would take a GPU by default.
    """
    _keep_out_of_collections(item)
    import mlx.core as mx

    mx.set_default_device(mx.gpu if item.get_closest_marker("gpu") and _has_gpu() else mx.cpu)


hypothesis.settings.register_profile("fuzz", max_examples=25_000, deadline=None)  # --hypothesis-profile=fuzz

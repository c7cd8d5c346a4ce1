"""Limits set on MLX on Metal while engines run, recorded by stand-ins for its functions."""

import gc
from pathlib import Path

import pytest

from flash_moe_mlx.experts import wired_memory
from flash_moe_mlx.experts.wired_memory import WiredShare

from ..support.models import make_small, smallest_limit, streamed

GB = 10**9
WORKING_SET = 36 * GB
UNLIMITED = 54 * GB  # MLX's own memory limit: one and a half working sets


class MLX:
    """`mlx.core` on a Mac, as far as limits go: it refuses what Metal refuses."""

    def __init__(self) -> None:
        self.wired, self.memory, self.active = 0, UNLIMITED, 0
        self.wirings: list[int] = []

    def get_active_memory(self) -> int:
        return self.active

    def set_wired_limit(self, limit: int) -> int:
        if limit > WORKING_SET:
            raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size")
        before, self.wired = self.wired, limit
        self.wirings.append(limit)
        return before

    def set_memory_limit(self, limit: int) -> int:
        before, self.memory = self.memory, limit
        return before


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> MLX:
    gc.collect()  # engines of other tests
    mlx = MLX()
    monkeypatch.setattr(wired_memory, "mx", mlx)
    monkeypatch.setattr(wired_memory, "backend", lambda: "metal")
    monkeypatch.setattr(wired_memory.system, "macos_version", lambda: (15, 1))
    monkeypatch.setattr(wired_memory.system, "recommended_working_set_bytes", lambda: WORKING_SET)
    return mlx


def test_shares_are_summed_and_given_back(metal: MLX):
    first = WiredShare(10 * GB)
    assert (metal.wired, metal.memory) == (10 * GB, 10 * GB)
    second = WiredShare(8 * GB)
    assert (metal.wired, metal.memory) == (18 * GB, 18 * GB)
    first.close()
    first.close()
    assert (metal.wired, metal.memory) == (8 * GB, 8 * GB)
    second.close()
    assert (metal.wired, metal.memory) == (0, UNLIMITED)


def test_never_above_the_working_set(metal: MLX):
    shares = [WiredShare(30 * GB), WiredShare(30 * GB)]
    assert metal.wired == WORKING_SET
    assert metal.memory == UNLIMITED  # what MLX itself would allow
    for share in shares:
        share.close()
    assert max(metal.wirings) == WORKING_SET and metal.wired == 0


def test_what_somebody_wired_before_stays_wired(metal: MLX):
    metal.wired, metal.memory = 5 * GB, 40 * GB
    share = WiredShare(10 * GB)
    share.close()
    assert (metal.wired, metal.memory) == (5 * GB, 40 * GB)


def test_arrays_of_others_are_not_counted_against_the_engine(metal: MLX):
    metal.active = 7 * GB
    share = WiredShare(10 * GB, dense_bytes=4 * GB)
    assert metal.memory == 13 * GB and metal.wired == 10 * GB
    share.resize(12 * GB)
    assert metal.memory == 15 * GB and metal.wired == 12 * GB
    share.close()
    share.resize(9 * GB)
    assert (metal.wired, metal.memory) == (0, UNLIMITED)


def test_an_engine_that_nobody_closed_gives_back(metal: MLX):
    share = WiredShare(10 * GB)
    del share
    gc.collect()
    assert (metal.wired, metal.memory) == (0, UNLIMITED)


@pytest.mark.parametrize("version", [(14, 7, 1), (15,), (26, 2)])
def test_macos_14_wires_nothing(metal: MLX, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]):
    monkeypatch.setattr(wired_memory.system, "macos_version", lambda: version)
    share = WiredShare(10 * GB)
    assert metal.wired == (10 * GB if version >= (15,) else 0)
    assert metal.memory == 10 * GB
    share.close()
    assert metal.memory == UNLIMITED


def test_other_backends_are_left_alone(metal: MLX, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wired_memory, "backend", lambda: "cuda")
    share = WiredShare(10 * GB)
    share.resize(12 * GB)
    assert (metal.wired, metal.memory) == (0, UNLIMITED)
    share.close()
    assert (metal.wirings, metal.memory) == ([], UNLIMITED)


def test_the_engine_wires_its_limit(metal: MLX, tmp_path: Path):
    directory = make_small(tmp_path / "checkpoint")
    limit = smallest_limit(directory)
    with streamed(directory, limit) as model:
        assert metal.wired == limit
        model.streaming.resize(2 * limit)
        assert metal.wired == 2 * limit
    assert (metal.wired, metal.memory) == (0, UNLIMITED)

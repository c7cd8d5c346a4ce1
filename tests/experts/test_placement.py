"""Who keeps which experts, and the plan file."""

import json
from pathlib import Path

import numpy as np
import pytest

from flash_moe_mlx.errors import DistributedError, RequestError
from flash_moe_mlx.experts.placement import Placement, check_alike

COUNTS = {3: 7, 5: 12}


@pytest.mark.parametrize("ranks", [1, 2, 5, 7])
def test_by_number_every_rank_has_its_part(ranks: int):
    placement = Placement.by_number(COUNTS, ranks)
    for layer, count in COUNTS.items():
        parts = [placement.counts(rank)[layer] for rank in range(ranks)]
        assert sum(parts) == count and max(parts) - min(parts) <= 1


def test_by_heat_loads_are_even():
    heat = {0: np.array([100, 50, 30, 20, 5, 5, 0, 0]), 1: np.zeros(8, int)}
    placement = Placement.by_heat(heat, 2)
    loads = [int(heat[0][placement.owners[0] == rank].sum()) for rank in (0, 1)]
    assert abs(loads[0] - loads[1]) <= 10 and placement.counts(0)[1] == 4
    uneven = Placement.by_heat({0: np.ones(16)}, 2, shares=[3, 1])
    assert uneven.counts(0)[0] == 12


def test_a_plan_comes_back_and_is_checked(tmp_path: Path):
    placement, path = Placement.by_number(COUNTS, 3), tmp_path / "plan.json"
    placement.write(path)
    again = Placement.read(path, COUNTS, 3)
    assert again.digest == placement.digest != Placement.by_number(COUNTS, 2).digest
    plan = json.loads(path.read_text())
    for wrong in (
        {**plan, "version": 2},
        {**plan, "owners": {"3": [0] * 7, "5": plan["owners"]["5"]}},
        {**plan, "owners": {"3": ["x"], "5": []}},
        {"owners": 1},
        [],
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(RequestError):
            Placement.read(path, COUNTS, 3)
    placement.write(path)
    for counts, ranks in ((COUNTS, 2), ({3: 7}, 3), ({3: 7, 5: 11}, 3)):
        with pytest.raises(RequestError):
            Placement.read(path, counts, ranks)


def test_more_ranks_than_experts_are_refused():
    with pytest.raises(RequestError, match="Use fewer ranks"):
        Placement.by_number(COUNTS, 8)


def test_ranks_that_differ_are_named():
    check_alike({"version": [1, 1, 1]})
    with pytest.raises(DistributedError, match=r"same version.*rank 1, 2"):
        check_alike({"version": [1, 2, 3]})

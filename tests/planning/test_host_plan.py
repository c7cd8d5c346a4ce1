"""plan() for several hosts: the disk that shares take, limits as load divides them, and the parts of a token's time."""

from importlib.resources import files
from pathlib import Path

import pytest

from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.experts.placement import Placement
from flash_moe_mlx.packing import PackSettings, open_packing, parse_share
from flash_moe_mlx.planning.host_plan import HostPlan, hosts_table, plan_hosts
from flash_moe_mlx.planning.planner import Planner
from flash_moe_mlx.planning.speed import Speed

DEMO = Path(str(files("flash_moe_mlx") / "demo"))
EXPERTS = 16
LAYERS = 8


def planner_at(limit: str) -> Planner:
    return Planner.open(DEMO, memory_limit=limit, max_context=128, speed=Speed(10e9, 1e-3, 1e9))


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_at("14MB")


def test_the_disk_is_what_the_largest_share_takes(planner: Planner, tmp_path: Path):
    sizes, counts = [], []
    for rank in range(3):
        share = parse_share(f"{rank}/3")
        with open_packing(DEMO, tmp_path / str(rank), PackSettings(None), share=share) as packing:
            sizes.append(packing.estimate().result_bytes)
            counts.append(sum(len(layer.experts) for layer in packing.plan.layers))
    found = plan_hosts(planner, 3)
    headers = max(sizes) - found.disk_bytes
    assert 0 < headers < (LAYERS + 1) * 32768
    assert found.num_experts == max(counts) and sum(counts) == LAYERS * EXPERTS


def test_each_host_divides_the_limit_as_load_does(planner: Planner):
    one, two = plan_hosts(planner, 1), plan_hosts(planner, 2)
    assert one.budget == planner.divide(planner.limit_bytes)
    assert one.smallest_limit_bytes == planner.smallest_limit_bytes
    counts = Placement.by_number(planner.num_experts, 2).counts(1)
    assert two.budget == planner.divide(planner.limit_bytes, counts)
    assert [e.routing for e in two.expectations] == ["local", "uniform"]
    assert two.expectations[1].hit_rate > one.expectations[1].hit_rate
    assert two.expectations[1].missed_bytes < one.expectations[1].missed_bytes


def test_a_token_waits_for_messages_and_for_less_of_everything_else(planner: Planner):
    fast, slow = (plan_hosts(planner, 4, link_us=us).expectations[0].tokens_per_second for us in (0.0, 100.0))
    assert fast and slow and 1 / slow - 1 / fast == pytest.approx(LAYERS * 2 * 3 * 100e-6)
    whole = plan_hosts(planner, 1, link_us=1e6).expectations[1].tokens_per_second
    assert whole and plan_hosts(planner, 2, link_us=0).expectations[1].tokens_per_second > whole


def test_hosts_that_hold_all_of_their_experts_read_nothing(planner: Planner):
    four = plan_hosts(planner, 4)
    assert four.num_slots == four.num_experts == LAYERS * EXPERTS // 4
    assert [(e.hit_rate, e.missed_bytes) for e in four.expectations] == [(1.0, 0.0)] * 2


def test_numbers_of_hosts_and_limits_that_do_not_work(planner: Planner):
    for hosts in (0, EXPERTS + 1):
        with pytest.raises(RequestError, match=rf"\[hosts\] must be from 1 to the {EXPERTS} experts"):
            plan_hosts(planner, hosts)
    none = plan_hosts(planner_at("1MB"), 2)
    assert (none.budget, none.num_slots, none.expectations) == (None, 0, ())
    head, first, second = hosts_table([plan_hosts(planner, 2), none])
    assert len(head) == len(first) == len(second) and second[3] == "does not fit"
    assert HostPlan.to_dict(none)["fits"] is False

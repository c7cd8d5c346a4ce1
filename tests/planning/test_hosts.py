"""Routing replayed over hosts that share the experts."""

import numpy as np
import pytest

from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.experts.trace import DECODE, RoutingTrace
from flash_moe_mlx.planning.hosts import replay_hosts

TIMES = {"read_us": 1000.0, "layer_us": 100.0, "link_us": 10.0}


def trace_of(choices: list[list[int]], num_experts: int = 8) -> RoutingTrace:
    experts = np.array(choices, np.int32)[:, None]
    ones = np.ones(len(choices), np.int64)
    return RoutingTrace(experts, np.full(len(choices), DECODE), (0,), num_experts, ones)


def test_a_token_waits_for_the_host_that_reads_most():
    # By number, host 0 keeps the even experts. Each token is new: the second half reads 3 on host 0, 1 on host 1.
    trace = trace_of([[1, 3, 5, 7], [0, 2, 4, 1]])
    one, two = (replay_hosts(trace, hosts, 4, **TIMES) for hosts in (1, 2))
    assert (one.longest_reads, two.longest_reads) == (3, 3)  # expert 1 was in memory on either
    assert one.microseconds == 3 * 1000 + 100 and two.microseconds == 3 * 1000 + 100 + 2 * 10
    assert one.hit_rate == two.hit_rate == 0.25


def test_heat_spreads_experts_that_number_puts_together():
    hot = [[0, 2, 4, 6], [1, 0, 2, 4]] * 20
    number = replay_hosts(trace_of(hot), 2, 2, **TIMES, replicas=4)
    heat = replay_hosts(trace_of(hot), 2, 3, **TIMES, by_heat=True)
    assert heat.longest_reads == 0 and number.tokens_per_second > 0
    with pytest.raises(RequestError, match="at least 4 slots"):
        replay_hosts(trace_of(hot), 2, 2, **TIMES)


def test_what_cannot_be_replayed_is_refused():
    with pytest.raises(RequestError, match="decoded tokens"):
        replay_hosts(trace_of([[0, 1]]), 2, 2, **TIMES)
    with pytest.raises(RequestError, match="each of 9 ranks"):
        replay_hosts(trace_of([[0, 1]] * 4), 9, 2, **TIMES)

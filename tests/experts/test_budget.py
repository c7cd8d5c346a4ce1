from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe_mlx.config import parse_size
from flash_moe_mlx.errors import MemoryLimitError
from flash_moe_mlx.experts.budget import LayerExperts, buffer_cache_bytes, divide


@dataclass(frozen=True)
class Footprint:
    """Footprint that are easy to add up."""

    dense_bytes: int = 1000
    load_bytes: int = 0
    kept_bytes: int = 0

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * length

    def scratch_bytes(self, batch: int, tokens: int, length: int) -> int:
        return 10 * batch * tokens


def smallest(experts: dict[int, LayerExperts], min_slots: int, footprint: Footprint = Footprint()) -> int:
    with pytest.raises(MemoryLimitError) as error:
        divide(1, footprint, experts, min_slots=min_slots, batch=1, tokens=8, length=32)
    assert error.value.smallest_limit_bytes is not None
    return error.value.smallest_limit_bytes


layers = st.dictionaries(
    st.integers(0, 60),
    st.builds(LayerExperts, record_bytes=st.integers(1, 10_000), num_experts=st.integers(1, 64)),
    min_size=1,
    max_size=8,
)


@given(layers, st.integers(1, 10), st.integers(0, 2_000_000))
def test_slots_fill_the_limit_and_never_exceed_it(experts: dict[int, LayerExperts], min_slots: int, extra: int) -> None:
    limit = smallest(experts, min_slots) + extra
    budget = divide(limit, Footprint(), experts, min_slots=min_slots, batch=1, tokens=8, length=32)
    used = sum(budget.num_slots[layer] * e.record_bytes for layer, e in experts.items())
    fixed = 1000 + 32 + 80 + buffer_cache_bytes(80)
    assert used == budget.slot_bytes <= limit - fixed
    for layer, e in experts.items():
        assert min(min_slots, e.num_experts) <= budget.num_slots[layer] <= e.num_experts
    incomplete = [e.record_bytes for layer, e in experts.items() if budget.num_slots[layer] < e.num_experts]
    if incomplete:
        assert limit - fixed - used < sum(incomplete), "another slot for every layer would have fitted"


@given(layers, st.integers(1, 10))
def test_the_smallest_limit_works_and_one_byte_less_does_not(experts: dict[int, LayerExperts], min_slots: int) -> None:
    limit = smallest(experts, min_slots)
    divide(limit, Footprint(), experts, min_slots=min_slots, batch=1, tokens=8, length=32)
    with pytest.raises(MemoryLimitError):
        divide(limit - 1, Footprint(), experts, min_slots=min_slots, batch=1, tokens=8, length=32)


def test_the_limit_that_the_message_names_works() -> None:
    for record in (7, 1_234, 7_077_888, 5_000_000_000):
        experts = {0: LayerExperts(record, 16)}
        with pytest.raises(MemoryLimitError) as error:
            divide(1, Footprint(), experts, min_slots=4, batch=1, tokens=8, length=32)
        named = str(error.value).split('memory_limit="')[1].split('"')[0]
        divide(parse_size(named), Footprint(), experts, min_slots=4, batch=1, tokens=8, length=32)


def test_loading_a_large_tensor_counts() -> None:
    experts = {0: LayerExperts(10, 4)}
    assert smallest(experts, 1, Footprint(load_bytes=10**9)) == 10**9 + 1000


def test_equal_layers_get_equal_shares() -> None:
    experts = {layer: LayerExperts(100, 64) for layer in range(6)}
    limit = smallest(experts, 4) + 100 * (6 * 10 + 2)
    budget = divide(limit, Footprint(), experts, min_slots=4, batch=1, tokens=8, length=32)
    assert list(budget.num_slots.values()) == [15, 15, 14, 14, 14, 14]

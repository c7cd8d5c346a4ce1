"""The memory plan: made once by load, and what plan() shows."""

import pytest

from flash_moe_mlx import load_model
from flash_moe_mlx.errors import MemoryLimitError
from flash_moe_mlx.experts import memory_plan
from flash_moe_mlx.storage import io_choice

from ..support.models import chat_config, make_converted, smallest_limit


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return make_converted(tmp_path_factory.mktemp("model"), config=chat_config(num_hidden_layers=2), bits=4)


@pytest.fixture
def divisions(monkeypatch: pytest.MonkeyPatch) -> list[memory_plan.Budget]:
    """Every division of a memory limit."""
    made: list[memory_plan.Budget] = []
    divide = memory_plan.divide

    def counted(*args, **options):
        made.append(divide(*args, **options))
        return made[-1]

    monkeypatch.setattr(memory_plan, "divide", counted)
    return made


@pytest.mark.parametrize("io", ["pread", "direct", "auto"])
def test_load_divides_the_limit_once(small, divisions, io):
    with load_model(small, memory_limit="1GB", max_context=64, io=io).streaming as streaming:
        assert len(divisions) == 1
        assert streaming._budget is divisions[0]
        assert streaming._budget.buffer_bytes >= streaming._store.buffer_bytes


def test_direct_reads_that_auto_chose_are_counted(small, divisions, monkeypatch):
    reads = io_choice.Reads("direct", "of a test", 4)
    monkeypatch.setattr(memory_plan, "choose_io", lambda *_: reads)
    with load_model(small, memory_limit="1GB", max_context=64).streaming as streaming:
        stats = streaming.stats()
        assert (stats.io, stats.io_reason) == ("direct", "of a test")
        assert len(divisions) == 2  # the first is what the choice rests on
        assert streaming._budget is divisions[1]
        assert streaming._store.buffer_bytes > 0
        assert divisions[1].buffer_bytes - divisions[0].buffer_bytes == streaming._store.buffer_bytes


def test_auto_reads_through_the_page_cache_where_the_limit_has_no_room_for_buffers(small, divisions, monkeypatch):
    monkeypatch.setattr(memory_plan, "choose_io", lambda *_: io_choice.Reads("direct", "of a test"))
    smallest = smallest_limit(small, max_context=64)
    divisions.clear()
    with load_model(small, memory_limit=smallest, max_context=64).streaming as streaming:
        assert streaming.stats().io == "pread"
        assert "no room" in streaming.stats().io_reason
        assert streaming._budget is divisions[0]


def test_nothing_is_opened_under_a_limit_that_can_not_hold(small, monkeypatch):
    monkeypatch.setattr("flash_moe_mlx.runtime.loading.ExpertStore", None)
    with pytest.raises(MemoryLimitError):
        load_model(small, memory_limit=1000, max_context=64)

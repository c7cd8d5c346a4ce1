"""plan() against the engine that load makes, from local files and from a hub that is asked for headers only."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from flash_moe_mlx.errors import CheckpointError, RequestError
from flash_moe_mlx.formats.hub_headers import FIRST_BYTES, download_headers
from flash_moe_mlx.planning.plan import Plan, plan
from flash_moe_mlx.planning.simulation import replay
from flash_moe_mlx.planning.speed import Speed, TokenWork, busy_note, measure_speed
from flash_moe_mlx.planning.synthetic_routing import LOCAL, make_routing
from flash_moe_mlx.runtime.loading import load_model
from flash_moe_mlx.stats import format_rate

from ..support.models import make_small, smallest_limit
from ..support.range_hub import Hub, serve_hub

DEMO = Path(str(files("flash_moe_mlx") / "demo"))
SPEED = Speed(weight_bytes_per_second=10e9, layer_seconds=1e-3, disk_bytes_per_second=1e9)
LIMIT = 14_000_000


@pytest.fixture(scope="module")
def demo() -> Plan:
    return plan(DEMO, memory_limit=LIMIT, max_context=128, speed=SPEED)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small"))


def test_the_budget_is_the_one_that_load_makes(demo: Plan):
    with load_model(DEMO, memory_limit=LIMIT, max_context=128).streaming as streaming:
        stats, budget = streaming.stats(), streaming._budget
    assert demo.at_limit is not None
    assert demo.at_limit.budget == budget
    assert (demo.at_limit.num_slots, demo.num_experts) == (stats.num_slots, stats.num_experts)
    assert demo.smallest_limit_bytes == smallest_limit(DEMO, max_context=128)
    assert demo.expert_bytes == 128 * demo.record_bytes, "27,648 bytes need no padding"


def test_a_limit_that_does_not_hold_is_said(demo: Plan):
    tight = plan(DEMO, memory_limit=demo.smallest_limit_bytes - 1, max_context=128, speed=SPEED)
    assert not tight.fits and tight.at_limit is None and tight.to_dict()["at_limit"] is None
    assert "does not fit" in str(tight)
    assert plan(DEMO, memory_limit=demo.smallest_limit_bytes, max_context=128, speed=SPEED).fits


def test_the_default_limit_is_explained(demo: Plan):
    default = plan(DEMO, max_context=128, speed=SPEED)
    assert "The memory limit is 70% of" in default.assumptions[0]
    assert not any("The memory limit is" in line for line in demo.assumptions)


def test_more_memory_is_never_slower(demo: Plan):
    limits = [point.limit_bytes for point in demo.sweep]
    assert limits == sorted(limits) and limits[0] == demo.smallest_limit_bytes
    for kind in range(2):
        rates = [point.expectations[kind].tokens_per_second for point in demo.sweep]
        assert rates == sorted(rates)
    local, uniform = demo.sweep[0].expectations
    assert local.hit_rate > uniform.hit_rate == pytest.approx(4 / 16, abs=0.05)
    assert demo.sweep[-1].expectations[1].hit_rate == 1.0
    assert demo.sweep[-1].num_slots == demo.num_experts


def test_the_best_limit_is_the_smallest_that_is_nearly_as_fast(demo: Plan):
    slow_disk = plan(DEMO, memory_limit=LIMIT, max_context=128, speed=replace(SPEED, disk_bytes_per_second=2e7))
    assert demo.best.limit_bytes < slow_disk.best.limit_bytes
    rates = {point.limit_bytes: point.expectations[0].tokens_per_second for point in slow_disk.sweep}
    best = rates[slow_disk.best.limit_bytes]
    assert best >= 0.97 * max(rates.values())
    assert all(rate < 0.97 * max(rates.values()) for limit, rate in rates.items() if limit < slow_disk.best.limit_bytes)


def test_seconds_of_a_token_are_its_parts():
    work = TokenWork(layers=10, weight_bytes=10**9, expert_bytes=14 * 10**7, shared_bytes=10**7)
    missed = 5 * 10**7
    alone = replace(SPEED, overlap=0.0)
    assert SPEED.token_seconds(work, 0) == pytest.approx(0.1 + 0.01)
    assert alone.token_seconds(work, missed) == pytest.approx(0.11 + 0.05)
    assert SPEED.token_seconds(work, missed) == pytest.approx(0.11 + 0.05 - 0.01)
    assert replace(SPEED, disk_bytes_per_second=1e12).token_seconds(work, missed) == pytest.approx(0.11)
    assert replace(SPEED, disk_bytes_per_second=None).token_seconds(work, 1) is None


def test_a_trace_sets_the_expectation(demo: Plan, tmp_path: Path):
    trace = make_routing(LOCAL, layers=8, num_experts=16, num_experts_per_tok=4, prompt_tokens=9, tokens=60)
    with_trace = plan(DEMO, memory_limit=LIMIT, max_context=128, speed=SPEED, trace=trace)
    first = with_trace.at_limit.expectations[0]
    assert first.routing == "trace"
    assert first.hit_rate == pytest.approx(replay(trace, with_trace.at_limit.budget.num_slots).decode_hit_rate)
    other = make_routing(LOCAL, layers=3, num_experts=16, num_experts_per_tok=4, tokens=5)
    with pytest.raises(RequestError, match="8 layers"):
        plan(DEMO, memory_limit=LIMIT, max_context=128, speed=SPEED, trace=other)
    np.savez(tmp_path / "t.npz", nothing=np.zeros(1))
    with pytest.raises(RequestError, match="trace"):
        plan(DEMO, speed=SPEED, trace=tmp_path / "t.npz")


def test_it_renders(demo: Plan):
    text, html, values = str(demo), demo._repr_html_(), json.loads(json.dumps(demo.to_dict(), allow_nan=False))
    assert "14.00 MB" in text and "tok/s" in text and "best" in text
    assert html.count("<table>") == 2 and "<script" not in html
    assert values["fits"] is True and len(values["sweep"]) == len(demo.sweep)
    assert values["at_limit"]["num_slots"] == demo.at_limit.num_slots
    named = replace(demo, model="<b>owner/name</b>")
    assert "<b>" not in named._repr_html_()


@pytest.mark.parametrize(
    ("rate", "text"),
    [(157.4, "160"), (12.34, "12"), (9.96, "10"), (5.83, "5.8"), (3.0, "3.0"), (0.1549, "0.15"), (0, "0")],
)
def test_rates_have_two_digits(rate: float, text: str):
    assert format_rate(rate) == text


def test_a_busy_machine_is_mentioned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (1.9, 9, 9))
    assert busy_note() is None
    monkeypatch.setattr("os.getloadavg", lambda: (2.1, 0, 0))
    assert "2.1 on 4 cores" in busy_note()


def test_this_machine_is_measured():
    speed = measure_speed(3e9)
    assert 1e8 < speed.weight_bytes_per_second < 1e13
    assert 0 < speed.layer_seconds < 1
    assert speed.disk_bytes_per_second == 3e9


def test_the_disk_is_probed_where_files_are_local(small: Path, monkeypatch: pytest.MonkeyPatch):
    given: list[float | None] = []

    def note(rate: float | None) -> Speed:
        given.append(rate)
        return replace(SPEED, disk_bytes_per_second=rate)

    monkeypatch.setattr("flash_moe_mlx.planning.planner.measure_speed", note)
    monkeypatch.setattr("flash_moe_mlx.planning.planner._PROBE_SECONDS", 0.05)
    assert plan(small, memory_limit="1GB", max_context=128).fits
    plan(small, memory_limit="1GB", max_context=128, disk_bytes_per_second=5e9)
    assert given[0] > 1e6 and given[1] == 5e9


# --- from a hub ---


def use_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use another hub, as HF_ENDPOINT does when huggingface_hub is imported."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_a_repository_is_planned_by_its_headers(small: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch):
    local = plan(small, memory_limit="1GB", max_context=128, speed=SPEED)
    with serve_hub(small, ranges=ranges) as hub:
        use_hub(hub, monkeypatch)
        remote = plan("owner/name", memory_limit="1GB", max_context=128, speed=SPEED)
    assert replace(remote, model=local.model) == local
    assert any(name.endswith(".safetensors") for name in hub.sent) and "tokenizer.json" not in hub.sent


def test_headers_alone_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A header longer than what is asked for first, and data that nobody asks for."""
    (tmp_path / "from").mkdir()
    entries = {
        f"t{i:05}": {"dtype": "U8", "shape": [500], "data_offsets": [500 * i, 500 * i + 500]} for i in range(3000)
    }
    header = json.dumps(entries).encode()
    assert len(header) > FIRST_BYTES
    data = len(header).to_bytes(8, "little") + header + bytes(1_500_000)
    (tmp_path / "from" / "model.safetensors").write_bytes(data)
    (tmp_path / "from" / "config.json").write_text("{}")
    (tmp_path / "to").mkdir()
    with serve_hub(tmp_path / "from") as hub:
        use_hub(hub, monkeypatch)
        download_headers("owner/name", tmp_path / "to")
    assert hub.sent["model.safetensors"] == FIRST_BYTES + 8 + len(header)
    written = tmp_path / "to" / "model.safetensors"
    assert written.stat().st_size == len(data)
    assert written.read_bytes()[: 8 + len(header)] == data[: 8 + len(header)]
    assert written.stat().st_blocks * 512 < 400_000, "the hole takes no room"
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["config.json", "model.safetensors"]


def test_what_a_hub_does_not_have_is_said(small: Path, monkeypatch: pytest.MonkeyPatch):
    with serve_hub(small) as hub:
        use_hub(hub, monkeypatch)
        with pytest.raises(CheckpointError, match="owner/other"):
            plan("owner/other", speed=SPEED)
    with pytest.raises(CheckpointError, match="network"):  # nobody listens there any more
        plan("owner/name", speed=SPEED)
    with pytest.raises(CheckpointError, match="Check the path"):
        plan(small / "nothing", speed=SPEED)

"""flash-moe plan, trace and simulate, on the embedded model."""

from importlib.resources import files
from pathlib import Path

import pytest

from flash_moe_mlx import RoutingTrace
from flash_moe_mlx.planning.speed import Speed

from ..support.command_line import document, invoke, refusal, succeed

LIMIT = ("--memory-limit", "14MB", "--max-context", "128")


@pytest.fixture(autouse=True)
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_moe_mlx.planning.planner.measure_speed", lambda rate: Speed(10e9, 1e-3, rate))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "routing.npz"
    printed = succeed("trace", "What is 17 + 25?", "--output", str(path), "--max-tokens", "12", *LIMIT)
    assert "42" in printed and str(path) in printed
    return path


def test_trace_as_json(tmp_path: Path):
    path = tmp_path / "routing.npz"
    options = ("--output", str(path), "--max-tokens", "3", "--system", "Be brief.", "--json", *LIMIT)
    told = document("trace", "What is 17 + 25?", *options)
    assert told["trace"] == str(path) and told["text"] and 0 < told["hit_rate"] < 1
    assert told["tokens"] == len(RoutingTrace.read(path).phase)


def test_plan_as_text_and_json(trace: Path):
    text = succeed("plan", *LIMIT, "--disk-rate", "1GB")
    assert "14.00 MB" in text and "local routing" in text and "the disk gives 1.00 GB/s" in text
    result = document("plan", *LIMIT, "--disk-rate", "1GB", "--trace", str(trace), "--json")
    assert result["fits"] and result["at_limit"]["num_slots"] == 49
    assert [e["routing"] for e in result["at_limit"]["expectations"]] == ["trace", "local", "uniform"]


def test_a_plot_that_can_not_be_written_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'flash_moe_mlx[plot]'")

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr("flash_moe_mlx.planning.plan.plan", measured)
    assert "got no folder no/such" in refusal("plan", "--plot", "no/such/speed.png")
    assert "png" in refusal("plan", "--plot", "speed.xyz")


def test_plan_says_what_does_not_fit():
    result = invoke("plan", "--memory-limit", "1MB", "--max-context", "128", "--disk-rate", "1GB")
    assert result.exit_code == 1 and "does not fit" in result.stdout
    assert "--memory-limit" in refusal("plan", "--memory-limit", "much")


def test_plan_for_several_hosts():
    text = succeed("plan", *LIMIT, "--disk-rate", "1GB", "--hosts", "1", "--hosts", "4", "--link-us", "25")
    (row,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["4"]]
    assert "100%," in row and "messages of 25 us" in text
    few = document("plan", *LIMIT, "--disk-rate", "1GB", "--hosts", "2", "--json")["hosts"]
    assert [(each["hosts"], each["fits"], each["num_experts"]) for each in few] == [(2, True, 64)]
    result = invoke("plan", "--memory-limit", "1MB", "--max-context", "128", "--disk-rate", "1GB", "--hosts", "2")
    assert result.exit_code == 1 and result.stdout.count("does not fit") == 2


def test_simulate_predicts_what_trace_measured(trace: Path):
    printed = succeed("trace", "What is 17 + 25?", "--output", str(trace), "--max-tokens", "12", *LIMIT)
    measured = float(printed.split("hit rate ")[1].split("%")[0]) / 100
    arguments = ("--model", str(files("flash_moe_mlx") / "demo"), *LIMIT, "--disk-rate", "1GB", "--json")
    (result,) = document("simulate", str(trace), *arguments)["results"]
    assert result["hit_rate"] == pytest.approx(measured, abs=0.02)
    assert result["tokens_per_second"] > 0


def test_simulate_compares_policies_and_slots(trace: Path):
    several = ("--slots", "4", "--slots", "8", "--policy", "lru", "--policy", "belady")
    rates = {
        (r["slots"], r["policy"]): r["decode_hit_rate"]
        for r in document("simulate", str(trace), *several, "--json")["results"]
    }
    assert rates["4", "lru"] <= rates["4", "belady"] <= rates["8", "belady"] and len(rates) == 4
    assert len(succeed("simulate", str(trace)).splitlines()) == 1 + 4, "a head; 4, 8, 12 and 16 slots"


def test_simulate_refuses(trace: Path):
    assert "--model" in refusal("simulate", str(trace), "--memory-limit", "1GB")
    assert "fifo" in refusal("simulate", str(trace), "--policy", "fifo")
    assert "routing trace" in refusal("simulate", str(trace.with_name("none.npz")))

"""The data of the plots, read back from the figures."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.lab import plot
from flash_moe_mlx.lab.profiling import PHASES, Profile
from flash_moe_mlx.planning.plan import Plan, plan
from flash_moe_mlx.planning.simulation import replay
from flash_moe_mlx.planning.speed import Speed
from flash_moe_mlx.planning.synthetic_routing import LOCAL, make_routing

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'flash_moe_mlx[plot]'")

TRACE = make_routing(LOCAL, layers=5, num_experts=16, num_experts_per_tok=4, prompt_tokens=4, tokens=40)


@pytest.fixture(scope="module")
def demo() -> Plan:
    demo = Path(str(files("flash_moe_mlx") / "demo"))
    return plan(demo, memory_limit="14MB", max_context=128, speed=Speed(10e9, 1e-3, 2e7))


def test_time_by_phase():
    profile = Profile(decode=dict.fromkeys(PHASES, 0.1) | {"experts": 0.4}, decode_tokens=100)
    (axes,) = plot.time_by_phase(profile).axes
    widths = {container.get_label(): container[0].get_width() for container in axes.containers}
    assert widths["experts"] == pytest.approx(4) and widths["router"] == pytest.approx(1)
    assert sum(widths.values()) == pytest.approx(10)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["decode"], "no prompt, no bar"


def test_hits_by_layer():
    found = replay(TRACE, 6)
    (axes,) = plot.hits_by_layer(found).axes
    heights = [bar.get_height() for bar in axes.containers[0]]
    expected = found.hits[1] / (found.hits + found.misses)[1]
    np.testing.assert_allclose(heights, 100 * expected)


def test_expert_frequency():
    axes = plot.expert_frequency(TRACE).axes[0]
    image = axes.images[0].get_array()
    assert image.shape == (5, 16)
    np.testing.assert_allclose(image.sum(axis=1), 400)  # K experts per token
    assert (np.diff(image, axis=1) <= 0).all()


def test_expert_heat():
    figure = plot.expert_heat(TRACE, {"first": 1, "last": 44})
    first, last = (axes.images[0] for axes in figure.axes[:2])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["first", "last"]
    assert first.get_clim() == last.get_clim() == (0, 100)
    for layer in range(5):
        assert set(np.flatnonzero(first.get_array()[layer])) == set(TRACE.experts[0, layer])
    np.testing.assert_allclose(last.get_array().sum(axis=1), 400)  # K experts per token
    weights = 0.5 ** ((43 - np.arange(44)) / 32)
    picked = (TRACE.experts[:, 2] == 7).any(axis=1)
    assert last.get_array()[2, 7] == pytest.approx(100 * weights[picked].sum() / weights.sum())
    for moments in ({}, {"none": 0}, {"too many": 45}):
        with pytest.raises(RequestError, match="from 1 to 44 tokens"):
            plot.expert_heat(TRACE, moments)


def test_speed_by_limit(demo: Plan):
    axes, second = plot.speed_by_limit(demo).axes
    *lines, best = axes.lines
    assert [line.get_label() for line in lines] == ["local routing", "uniform routing"]
    assert lines[1].get_ydata() == pytest.approx([p.expectations[1].tokens_per_second for p in demo.sweep])
    assert [tuple(line.get_ydata()) for line in second.lines] == [
        tuple(100 * p.expectations[number].hit_rate for p in demo.sweep) for number in (0, 1)
    ]
    assert [line.get_color() for line in second.lines] == [line.get_color() for line in lines]
    assert second.get_ylabel().startswith("hits, %") and "disk 20.00 MB/s" in axes.get_title()
    assert best.get_xdata()[0] == pytest.approx(demo.best.limit_bytes / 1e6)
    unknown = [
        replace(point, expectations=tuple(replace(e, tokens_per_second=None) for e in point.expectations))
        for point in demo.sweep
    ]
    (axes,) = plot.speed_by_limit(replace(demo, sweep=tuple(unknown))).axes
    assert axes.get_ylabel() == "hits, %"


def test_files_are_written_or_refused(demo: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure = plot.speed_by_limit(demo)
    plot.save(figure, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    for name in ("speed.xyz", "none/speed.png"):
        with pytest.raises(RequestError, match="png"):
            plot.save(figure, tmp_path / name)
        with pytest.raises(RequestError, match=r"no folder none|formats .*png"):
            plot.check_path(name)
    plot.check_path(tmp_path / "speed.svg")


def test_matplotlib_is_imported_when_it_is_used():
    code = (
        "import sys, json, flash_moe_mlx.plot; before = 'matplotlib' in sys.modules; sys.modules['matplotlib'] = None\n"
        "from flash_moe_mlx.errors import RequestError\n"
        "from flash_moe_mlx.lab.profiling import Profile\n"
        "try: flash_moe_mlx.plot.time_by_phase(Profile())\n"
        "except RequestError as error: print(json.dumps([before, str(error)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, message = json.loads(done.stdout)
    assert not before and "[plot]" in message

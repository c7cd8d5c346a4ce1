"""The models that the package knows: their figures follow from their dimensions, and names work where --model does."""

import json
from pathlib import Path

import pytest

from flash_moe_mlx import plan
from flash_moe_mlx.errors import DiskFullError
from flash_moe_mlx.planning import preset_figures, presets
from flash_moe_mlx.planning.speed import Speed
from flash_moe_mlx.runtime import downloads

from ..support.checkpoints import make_checkpoint
from ..support.command_line import document, invoke, refusal, succeed
from ..support.hub import COMMIT, REPOSITORY, serve

SPEED = Speed(1e10, 1e-3, 3e9)

# What pages about the repositories say, without vision towers: the hub's own sizes can't be asked for here.
PUBLISHED_GB = {"qwen3.5-397b-4bit": 223, "gpt-oss-120b": 63.4, "glm-4.5-air-4bit": 60.2, "qwen3-235b-4bit": 132}


@pytest.mark.parametrize(("name", "size"), PUBLISHED_GB.items())
def test_sizes_are_those_of_the_published_files(name: str, size: float):
    assert presets.require(name).figures.checkpoint_bytes / 1e9 == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize("name", ["qwen3.5-35b-4bit", "gpt-oss-20b"])
def test_figures_follow_from_the_dimensions(name: str, tmp_path: Path):
    preset = presets.require(name)
    measured = preset_figures.measure(preset.config, preset.bits, tmp_path, lambda: None)
    stored = vars(preset.figures)
    assert {key: value for key, value in measured.items() if "limit" not in key} == {
        key: value for key, value in stored.items() if "limit" not in key
    }
    assert measured["cpu_limit_bytes"] == pytest.approx(stored["cpu_limit_bytes"], rel=0.1)
    size = sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512
    assert size < 20e6  # holes


def test_a_plan_by_name_needs_no_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = plan("qwen3.5-35b-4bit", memory_limit="8GB", speed=SPEED)
    assert capsys.readouterr().out == ""
    preset = presets.require("qwen3.5-35b-4bit")
    figures = preset.figures
    assert found.fits and found.num_experts == figures.layers * figures.num_experts
    assert preset.repository in found.assumptions[0]
    slots = figures.slots(8 * 10**9, "cpu")
    assert found.at_limit.num_slots / figures.layers == pytest.approx(slots, rel=0.05)
    hit_rate, rate = preset_figures.expect(figures, slots, SPEED)
    local = found.at_limit.expectations[0]
    assert hit_rate == pytest.approx(local.hit_rate, abs=0.03)
    assert rate == pytest.approx(local.tokens_per_second, rel=0.1)


def test_models_are_listed_with_what_is_in_the_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(downloads, "cached", lambda: {"mlx-community/Qwen3.5-35B-A3B-4bit": 5, "a/b": 7})
    result = document("models", "--memory-limit", "16GB", "--no-speed", "--json")
    by_name = {entry["name"]: entry for entry in result["models"]}
    assert by_name.keys() == {preset.name for preset in presets.presets()}
    assert by_name["qwen3.5-35b-4bit"]["cached_bytes"] == 5 and result["other_cached"] == {"a/b": 7}
    assert by_name["qwen3.5-35b-4bit"]["fits"] and not by_name["qwen3.5-397b-8bit"]["fits"]
    text = succeed("models", "--memory-limit", "16GB", "--no-speed")
    assert all(preset.repository in text for preset in presets.presets()) and "does not fit" in text


def test_names_work_as_models():
    from flash_moe_mlx.cli.options import model_path

    assert model_path("gpt-oss-20b") == "mlx-community/gpt-oss-20b-MXFP4-Q8"
    assert model_path("some/where") == "some/where"
    assert "flash-moe models" in refusal("pull", "nonsense")
    assert "one model" in refusal("plan", "gpt-oss-20b", "--model", "x/y")


def test_a_plan_that_does_not_fit_ends_with_1():
    result = invoke("plan", "gpt-oss-20b", "--memory-limit", "1GB", "--disk-rate", "3GB")
    assert result.exit_code == 1 and "does not fit" in result.stdout


def test_pull_downloads_once_and_checks_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_checkpoint(tmp_path / "source")
    (source / "notes.bin").write_bytes(b"x" * 1000)  # nothing that load reads
    with serve(source) as hub:
        from huggingface_hub import HfApi

        monkeypatch.setattr(downloads, "HfApi", lambda: HfApi(endpoint=hub.endpoint))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr(downloads, "HF_HUB_CACHE", str(tmp_path / "cache"))
        fetched = []

        def snapshot(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
            fetched.append((repository, revision))
            return str(source)

        monkeypatch.setattr(downloads, "snapshot_download", snapshot)
        monkeypatch.setattr(downloads, "try_to_load_from_cache", lambda *_, **__: None)
        found = downloads.look_up(REPOSITORY)
        read = sum(path.stat().st_size for path in source.iterdir() if path.suffix != ".bin")
        assert (found.revision, found.total_bytes, found.missing_bytes) == (COMMIT, read, read)
        dry = document("pull", REPOSITORY, "--dry-run", "--json")
        assert dry["missing_bytes"] == read and fetched == []
        assert succeed("pull", REPOSITORY) == f"{source}\n" and fetched == [(REPOSITORY, COMMIT)]
        monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
        with pytest.raises(DiskFullError, match=r"Free .* HF_HOME"):
            downloads.fetch(downloads.look_up(REPOSITORY))
        monkeypatch.setattr(downloads, "try_to_load_from_cache", lambda *_, **__: str(source))
        assert downloads.fetch(downloads.look_up(REPOSITORY)) == source  # all there: no room is needed
    assert "can't be had from the hub" in refusal("pull", "nobody/nothing")


def test_presets_are_written_once():
    entries = json.loads((Path(presets.__file__).parent / "presets.json").read_text())
    names = [entry["name"] for entry in entries]
    repositories = [entry["repository"] for entry in entries]
    assert len(set(names)) == len(names) and len(set(repositories)) == len(repositories)

"""``flash-moe bench`` and ``doctor`` on the embedded model."""

from pathlib import Path

import pytest

from flash_moe_mlx.cli import doctor as module
from flash_moe_mlx.lab import kernel_check
from flash_moe_mlx.lab.kernel_check import KernelCheck

from ..support.command_line import document, refusal, succeed

SHORT = ("--prompt-tokens", "16", "--max-tokens", "4", "--memory-limit", "14MB", "--max-context", "128")


def test_bench_counts_every_run_in_full():
    result = document("bench", "--json", "--runs", "2", *SHORT)
    assert [set(run) for run in result["runs"]] == [set(result["runs"][0])] * 2
    speeds = sorted(run["generation_tps"] for run in result["runs"])
    assert result["median_generation_tps"] == pytest.approx(sum(speeds) / 2)
    assert result["state"] == "warm" and 0 < result["num_slots"] < result["num_experts"]


def test_cold_runs_find_no_expert_in_memory():
    cold, warm = (document("bench", "--json", "--runs", "1", *more, *SHORT) for more in (("--cold",), ()))
    assert cold["state"] == "cold"
    assert cold["runs"][0]["hit_rate"] < warm["runs"][0]["hit_rate"]
    assert "directory" in refusal("bench", "--cold", "--model", "no/such/place")


def test_bench_prints_a_row_per_run():
    lines = succeed("bench", "--runs", "2", *SHORT).splitlines()
    assert len(lines) == 5 and lines[-1].startswith("median decode ")


def test_kernels_are_timed_beside_mlx():
    result = document("bench", "kernels", "--quick", "--json")
    assert result["backend"] in ("cpu", "cuda", "metal") and result["copy_gb_s"] > 0
    names = [row["name"] for row in result["rows"]]
    assert len(names) == len(set(names)) >= 12
    for part in ("MoE layer", "matvec", "gated delta"):
        assert any(name.startswith(part) for name in names)
    for row in result["rows"]:
        assert row["ours_us"] > 0
        assert row["relative_rms"] is None or row["relative_rms"] < 0.01


def test_doctor_measures_the_disk(tmp_path: Path):
    for where in (("--directory", str(tmp_path)), ("--model", str(module.model_path(None)))):
        result = document("doctor", "--json", "--no-kernels", *where)
        assert result["disk"]["bytes_per_second"] > 0 and result["disk"]["num_reads"] > 0
        assert result["memory"]["physical_bytes"] >= result["memory"]["default_memory_limit_bytes"] > 0
        assert result["versions"]["mlx"] and result["backend"] in ("cpu", "cuda", "metal")
    assert list(tmp_path.iterdir()) == []
    assert "no/such" in refusal("doctor", "--model", "no/such")


def test_doctor_checks_the_kernels(monkeypatch: pytest.MonkeyPatch):
    result = document("doctor", "--json", "--no-disk")
    assert len(result["kernels"]) >= 12 and all(check["ok"] for check in result["kernels"])
    broken = KernelCheck("router_topk", None, 0.1, "program_source:12:3: error: unknown type")
    monkeypatch.setattr(kernel_check, "check_kernels", lambda: [broken, KernelCheck("moe_combine", 1e-3, 0.1)])
    text = succeed("doctor", "--no-disk")
    assert "1 of 2 operations" in text and "program_source:12:3" in text and "FLASH_MOE_REFERENCE=1" in text


def test_doctor_prints_what_json_has():
    text = succeed("doctor", "--no-disk", "--no-kernels")
    assert "backend" in text and "default memory limit" in text and "disk" not in text


GOOD = {
    "backend": "metal",
    "cpu_kernels": True,
    "versions": {},
    "memory": {"physical_bytes": 64e9, "cgroup_limit_bytes": None, "recommended_working_set_bytes": 60e9},
    "disk": {"direct": True, "plausible": True, "bytes_per_second": 5e9},
    "kernels": [{"ok": True}],
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"disk": None}, None),
        ({"disk": {"direct": True, "plausible": True, "bytes_per_second": 2e8}}, "200.00 MB/s"),
        ({"disk": {"direct": True, "plausible": False, "bytes_per_second": 25e9}}, "came from memory"),
        ({"disk": {"direct": False, "plausible": True, "bytes_per_second": 9e9}}, "no direct reads"),
        ({"memory": {**GOOD["memory"], "recommended_working_set_bytes": 40e9}}, "iogpu.wired_limit_mb"),
        ({"memory": {**GOOD["memory"], "cgroup_limit_bytes": 8e9}}, "8.00 GB"),
        ({"backend": "cpu", "cpu_kernels": False}, "numba"),
        ({"kernels": [{"ok": True}, {"ok": False}]}, "FLASH_MOE_REFERENCE=1"),
    ],
)
def test_advice(changes: dict, words: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.system, "is_macos", lambda: False)
    monkeypatch.setattr(module.os.path, "exists", lambda path: False)
    advice = module._advice({**GOOD, **changes})
    assert len(advice) == (words is not None)
    assert words is None or words in advice[0]


@pytest.mark.parametrize("cpu_kernels", [True, False])
def test_advice_on_a_mac_without_its_gpu(cpu_kernels: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.system, "is_macos", lambda: True)
    monkeypatch.setattr(module.os.path, "exists", lambda path: False)
    advice = module._advice({**GOOD, "backend": "cpu", "cpu_kernels": cpu_kernels})
    assert len(advice) == 1 and "Apple silicon" in advice[0]


def test_advice_about_versions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "requires", lambda _: ["mlx<0.33,>=0.32", "numpy>=1.26", "numba>=9; extra == 'cpu'"])
    found = {**GOOD, "versions": {"mlx": "0.40.1", "numpy": "2.4.6", "numba": "0.1"}}
    assert module._advice(found) == ["mlx 0.40.1 must be <0.33,>=0.32: pip install 'mlx<0.33,>=0.32'."]

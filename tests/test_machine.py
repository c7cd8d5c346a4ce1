from pathlib import Path

import pytest

import flash_moe_mlx
from flash_moe_mlx import machine

DEMO = Path(flash_moe_mlx.__file__).parent / "demo"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cgroup_v1_limit_of_a_parent_counts(tmp_path: Path) -> None:
    write(tmp_path / "self", "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/ignored\n")
    write(tmp_path / "cg/memory/memory.limit_in_bytes", str(2**63 - 4096))
    write(tmp_path / "cg/memory/a/memory.limit_in_bytes", "4000000000\n")
    write(tmp_path / "cg/memory/a/b/memory.limit_in_bytes", "8000000000\n")
    assert machine.cgroup_limit_bytes(tmp_path / "cg", tmp_path / "self") == 4_000_000_000


def test_cgroup_v2(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/user.slice\n")
    write(tmp_path / "cg/user.slice/memory.max", "max\n")
    assert machine.cgroup_limit_bytes(tmp_path / "cg", tmp_path / "self") is None
    write(tmp_path / "cg/memory.max", "3000000000\n")
    assert machine.cgroup_limit_bytes(tmp_path / "cg", tmp_path / "self") == 3_000_000_000


def test_no_cgroups(tmp_path: Path) -> None:
    assert machine.cgroup_limit_bytes(tmp_path, tmp_path / "absent") is None


def test_default_limit_is_a_share_of_the_smallest(monkeypatch) -> None:
    monkeypatch.setattr(machine, "physical_memory_bytes", lambda: 64 * 10**9)
    monkeypatch.setattr(machine, "cgroup_limit_bytes", lambda: None)
    free = machine.default_memory_limit_bytes()
    assert free < 0.7 * 64 * 10**9
    assert machine.default_memory_limit_bytes(48 * 10**9) == 0.9 * 48 * 10**9 - machine.PROCESS_OVERHEAD_BYTES < free
    assert "90% of the 48.00 GB that Metal" in machine.explain_default_memory_limit(48 * 10**9)
    assert machine.default_memory_limit_bytes(60 * 10**9) == free
    assert "70% of 64.00 GB" in machine.explain_default_memory_limit(60 * 10**9)
    assert machine.default_memory_limit_bytes(None, 24 * 10**9) == int(0.7 * 24 * 10**9)
    assert "70% of 24.00 GB of GPU memory" in machine.explain_default_memory_limit(None, 24 * 10**9)
    assert machine.default_memory_limit_bytes(None, 141 * 10**9) == free
    monkeypatch.setattr(machine, "cgroup_limit_bytes", lambda: 10 * 10**9)
    assert machine.default_memory_limit_bytes(48 * 10**9) < 0.7 * 10 * 10**9


@pytest.mark.parametrize(("usable", "limit"), [(700, 50), (1000, 200), (600, 0), (100, 0)])
def test_default_limit_where_little_may_be_used(monkeypatch: pytest.MonkeyPatch, usable: int, limit: int) -> None:
    """It was 1 byte, which a refusal then said that somebody had asked for."""
    monkeypatch.setattr(machine, "physical_memory_bytes", lambda: 64 * 10**9)
    monkeypatch.setattr(machine, "cgroup_limit_bytes", lambda: usable * 10**6)
    assert machine.default_memory_limit_bytes() == limit * 10**6
    if limit:
        assert "50% of what" in machine.explain_default_memory_limit()


@pytest.mark.parametrize("usable", [500, 650])
def test_a_refused_default_says_that_nobody_gave_it(monkeypatch: pytest.MonkeyPatch, usable: int) -> None:
    monkeypatch.setattr(machine, "cgroup_limit_bytes", lambda: usable * 10**6)
    with pytest.raises(flash_moe_mlx.MemoryLimitError) as refused:
        flash_moe_mlx.load_model(DEMO)
    assert ("must be given" if usable < 600 else "No limit was given: this one is 50% of") in str(refused.value)
    assert (refused.value.smallest_limit_bytes is None) == (usable < 600)

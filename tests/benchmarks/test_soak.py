"""The soak for a minute: memory, threads and descriptors stay where they were after the first requests."""

import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from benchmarks.soak import plot, read_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_a_short_soak_is_flat(tmp_path: Path) -> None:
    output = tmp_path / "soak.tsv"
    command = [sys.executable, "-m", "benchmarks.soak", "--requests", "120", "--every", "1", "--loads", "4",
               "--output", str(output)]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    rows = read_rows(output)
    warm = [row for row in rows if row["requests"] >= 40 and not row["loads"]]  # every way of calling has come by then
    assert len(warm) >= 3, rows
    third = len(warm) // 3
    for name, most in (("anonymous_bytes", 6e6), ("heap_used_bytes", 6e6), ("threads", 1), ("descriptors", 1)):
        values = [row[name] for row in warm]
        # Means: the heap is trimmed every few seconds, and grows by some megabytes in between.
        assert abs(mean(values[-third:]) - mean(values[:third])) <= most, (name, values)
    outside = [row for row in warm if not 50 < row["requests"] < 80]  # the larger limit holds from 54 to 66
    assert all(0.5 < row["hit_rate"] < 0.999 for row in outside), "experts are evicted, and most requests hit"
    assert len({row["limit_bytes"] for row in rows}) == 2, "resized in the middle"
    loads = [row for row in rows if row["loads"]]
    assert [row["loads"] for row in loads] == [1, 2, 3, 4]
    for name in ("threads", "descriptors", "mlx_active_bytes"):
        assert loads[1][name] == loads[-1][name], (name, loads)
    plot(rows, tmp_path / "soak.svg")
    assert (tmp_path / "soak.svg").stat().st_size > 10_000

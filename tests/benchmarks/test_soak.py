"""The soak for half a minute: memory, threads and descriptors stay where they were after the first requests."""

import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from benchmarks.soak import COLUMNS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_a_short_soak_is_flat(tmp_path: Path) -> None:
    output = tmp_path / "soak.tsv"
    command = [sys.executable, "-m", "benchmarks.soak", "--requests", "120", "--every", "1", "--output", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    rows = [dict(zip(COLUMNS, map(float, line.split()), strict=True)) for line in output.read_text().splitlines()[1:]]
    warm = [row for row in rows if row["requests"] >= 40]  # every way of calling has come by then
    assert len(warm) >= 3, rows
    third = len(warm) // 3
    for name, most in (("anonymous_bytes", 6e6), ("heap_used_bytes", 6e6), ("threads", 1), ("descriptors", 1)):
        values = [row[name] for row in warm]
        # Means: the heap is trimmed every few seconds, and grows by some megabytes in between.
        assert abs(mean(values[-third:]) - mean(values[:third])) <= most, (name, values)
    assert all(0.5 < row["hit_rate"] < 0.999 for row in warm), "experts are evicted, and most requests hit"

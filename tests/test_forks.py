"""A process forked from one that computes has none of its threads: it is told so at once, and never waits for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "support" / "forking_child.py"
REFUSED = ["load-after-mlx", "forward", "generate", "async", "continue", "prefix-cache", "resize", "clear", "load"]
WORKS = ["load-first", "close", "exit"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_never_hangs() -> None:
    done = subprocess.run([sys.executable, str(CHILD)], capture_output=True, text=True, timeout=300, check=True)
    lines = done.stdout.splitlines()
    codes = dict(line.split() for line in lines if "Error" not in line)
    assert codes == dict.fromkeys(REFUSED, "3") | dict.fromkeys(WORKS, "0"), done.stdout + done.stderr
    refusals = [line for line in lines if "Error" in line]
    assert len(refusals) == len(REFUSED)
    for line in refusals:
        assert line.startswith("StoreError: [")
        assert "forked" in line and 'multiprocessing\'s "spawn"' in line

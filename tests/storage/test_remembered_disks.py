"""The cache file of probed disks: whatever is in it, a number of threads comes out."""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from flash_moe_mlx.storage import io_choice
from flash_moe_mlx.storage.disk_probe import DiskProbe

from ..support.mutations import VALUES, mutate


@pytest.fixture
def threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "records"
    path.write_bytes(b"x")
    probe = DiskProbe(1, 10**9, 1.0, 2, True)
    monkeypatch.setattr(io_choice, "probe_disk", lambda *_, **__: probe)
    return lambda remembered: io_choice.choose_threads([path], 1000, 1 << 40, remembered)


def test_any_content_is_survived(threads: Any, tmp_path: Path):
    remembered, key = tmp_path / "disks.json", f"{(tmp_path / 'records').stat().st_dev}:1000"
    rng = random.Random(2)
    texts = [mutate(json.dumps({key: {"threads": 4, "probed": int(time.time())}}).encode(), rng) for _ in range(200)]
    texts += [json.dumps({key: {"threads": value, "probed": int(time.time())}}).encode() for value in VALUES]
    texts += [json.dumps({key: {"threads": 4, "probed": value}}).encode() for value in VALUES]
    for text in texts:
        remembered.write_bytes(text)
        assert threads(remembered) in io_choice.APPLE_DEPTHS


def test_a_pipe_in_its_place_is_not_waited_for(threads: Any, tmp_path: Path):
    os.mkfifo(tmp_path / "disks.json")
    assert threads(tmp_path / "disks.json") == 2

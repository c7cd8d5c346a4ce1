"""The memory limit holds through load, prefill and decode: MLX's own peak, and the process's anonymous memory."""

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from benchmarks.synthetic import Dimensions, write_checkpoint

from flash_moe_mlx import MemoryLimitError, load_model

CHILD = Path(__file__).parents[1] / "support" / "memory_child.py"
DEMO = Path(__file__).parents[2] / "src" / "flash_moe_mlx" / "demo"
PROMPT, NEW = 512, 64

pytestmark = [pytest.mark.slow, pytest.mark.serial]


@dataclass
class Outcome:
    """A child's report, and its peak anonymous memory."""

    report: dict[str, int]
    anonymous_bytes: int


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def run(model: str, limit: str, *, io: str = "auto", max_context: int = 2048) -> Outcome:
    """Run the child and watch its anonymous resident memory, every few milliseconds, from outside."""
    command = [sys.executable, str(CHILD), model, str(DEMO), limit, io, str(PROMPT), str(NEW), str(max_context)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"MALLOC_ARENA_MAX": "2"}, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    most = 0
    while not select.select([child.stdout], [], [], 0.003)[0]:  # also at its end, expected or not
        most = max(most, anonymous_bytes(child.pid))
    text = child.stdout.readline()
    most = max(most, anonymous_bytes(child.pid))
    child.stdin.close()
    assert child.wait() == 0, text
    return Outcome(json.loads(text), most)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than 2 GB of experts at 4 bits, and a dense part of 300 MB; all logits of a prompt would take 245 MB."""
    dimensions = Dimensions(
        hidden_size=2048, num_hidden_layers=8, num_attention_heads=8, num_experts=160, num_experts_per_tok=4,
        linear_num_key_heads=4, linear_num_value_heads=8, vocab_size=120_000,
    )  # fmt: skip
    directory = write_checkpoint(tmp_path_factory.mktemp("memory") / "model", dimensions)
    experts = 8 * 160 * 1_769_472
    assert experts > 2 * 10**9
    return directory


@pytest.fixture(scope="module")
def control() -> Outcome:
    return run("-", "1GB")


def smallest_limit(directory: Path, max_context: int) -> int:
    with pytest.raises(MemoryLimitError) as error:
        load_model(directory, memory_limit="1MB", max_context=max_context)
    assert error.value.smallest_limit_bytes is not None
    return error.value.smallest_limit_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
@pytest.mark.parametrize("share", ["smallest", "1.5GB"])
def test_limit_holds(checkpoint: Path, control: Outcome, share: str) -> None:
    limit = str(smallest_limit(checkpoint, 2048)) if share == "smallest" else share
    outcome = run(str(checkpoint), limit)
    report, grown = outcome.report, outcome.anonymous_bytes - control.anonymous_bytes
    print(f"{share}: {report}, grown {grown}")
    assert report["tokens"] == NEW
    assert 4 * 8 <= report["slots"] < report["experts"]
    assert report["load_peak_bytes"] <= report["limit_bytes"]
    assert report["peak_bytes"] <= report["limit_bytes"]
    assert grown <= report["limit_bytes"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_direct_io_counts_its_own_buffers(checkpoint: Path, control: Outcome) -> None:
    outcome = run(str(checkpoint), "900MB", io="direct")
    assert outcome.report["peak_bytes"] <= outcome.report["limit_bytes"]
    assert outcome.anonymous_bytes - control.anonymous_bytes <= outcome.report["limit_bytes"]


def test_the_limit_that_a_refusal_names_works(checkpoint: Path) -> None:
    with pytest.raises(MemoryLimitError) as error:
        load_model(checkpoint, memory_limit="1MB")
    named = str(error.value).split('memory_limit="')[1].split('"')[0]
    model = load_model(checkpoint, memory_limit=named)
    assert model.streaming.stats().num_slots == 4 * 8
    model.streaming.close()

"""Memory and threads of the whole process, watched from outside over many generations in every way of calling."""

import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from benchmarks.synthetic import Dimensions, write_checkpoint

import flash_moe_mlx

CHILD = Path(__file__).parents[1] / "support" / "ways_of_calling_child.py"
DEMO = Path(flash_moe_mlx.__file__).parent / "demo"
LIMIT = 80_000_000
WAYS = ["generate", "threads", "async", "mlx_lm", "abandoned", "abandoned-thread"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.serial,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)"),
]


@dataclass
class Seen:
    """A child as seen from outside: its peak anonymous memory, and figures at each line that it printed."""

    most: int = 0
    anonymous: dict[str, int] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)


def status(pid: int) -> tuple[int, int]:
    """Anonymous bytes and threads of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    # One that has just ended has no memory.
    return int(lines.get("RssAnon", "0").split()[0]) * 1024, int(lines["Threads"])


def watch(*arguments: str) -> Seen:
    command = [sys.executable, str(CHILD), *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    seen = Seen()
    while True:
        if not select.select([child.stdout], [], [], 0.005)[0]:
            seen.most = max(seen.most, status(child.pid)[0])
            continue
        if not (line := child.stdout.readline().strip()):
            break
        seen.anonymous[line], seen.threads[line] = status(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
    assert child.wait() == 0
    return seen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of which a quarter of the experts fit; a prompt's activations are buffers of some megabytes."""
    dimensions = Dimensions(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=4, num_experts=64, num_experts_per_tok=8,
        linear_num_key_heads=4, linear_num_value_heads=8, vocab_size=4096,
    )  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("process") / "model", dimensions)


def test_memory_and_threads_stay_flat(checkpoint: Path, request: pytest.FixtureRequest) -> None:
    generations = request.config.getoption("--generations")  # of each way, of which there are six
    control = watch("-", str(DEMO), "0", "0").anonymous["control"]
    for _ in range(2):  # what malloc gives back late is counted once, a leak is there again
        seen = watch(str(checkpoint), str(DEMO), str(LIMIT), str(generations))
        grown = {way: seen.anonymous[f"after {way}"] - seen.anonymous[f"before {way}"] for way in WAYS}
        if max(grown.values()) < 16_000_000:
            break
    began = {way: seen.threads[f"after {way}"] - seen.threads[f"before {way}"] for way in WAYS}
    print(f"most beyond the control {(seen.most - control) / 1e6:.1f} MB, grown {grown}, threads {began}")
    # CPU kernels are compiled once and stay: code and LLVM take some 60 MB, which the control has not.
    assert seen.most - control <= LIMIT + 60_000_000
    assert max(grown.values()) < 16_000_000
    assert max(began.values()) <= 1

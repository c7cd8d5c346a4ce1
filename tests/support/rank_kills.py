"""Kills of a random rank at random moments: every other rank must end within its time, and no process may be left.

python -m tests.support.rank_kills --kills 50 --ranks 4
python -m tests.support.rank_kills --kills 50 --launch

Ranks are forked from a process that has imported everything, so that kills meet each stage of a start. They have no
launcher that ends the others: a rank that dies before it has met another is awaited as one that starts late. With
--launch, mlx.launch starts the command `generate` with the demo model on each rank.
"""

import argparse
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .models import chat_config, make_converted
from .ranks import ROOT, Ranks, ranks_running

BOUND = 10.0
Kill = Callable[[int, float, int], tuple[str, float]]
"""Starts ranks, kills one after some seconds, and returns how the others ended and how many seconds later."""


def kill_one_of_forked(ranks: Ranks, directory: Path, scratch: Path) -> Kill:
    ranks.run(1, directory, scratch, {"do": "logits", "numba": False})  # until everything is imported

    def run(victim: int, delay: float, count: int) -> tuple[str, float]:
        had_begun = False

        def kill(pids: list[int], _: object) -> None:
            nonlocal had_begun
            time.sleep(delay)
            with suppress(OSError):
                os.kill(pids[victim], signal.SIGSTOP)
                had_begun = any("socket:" in os.readlink(file) for file in Path(f"/proc/{pids[victim]}/fd").iterdir())
                os.kill(pids[victim], signal.SIGKILL)

        ended = ranks.run(count, directory, scratch, {"do": "logits", "numba": False}, 200, during=kill)
        if ended[victim].status == 0:
            return "after the end", 0.0
        others = [rank for number, rank in enumerate(ended) if number != victim]
        how = {rank.results[0].get("error", "results") if rank.results else f"exit {rank.status}" for rank in others}
        seconds = max(rank.seconds for rank in others) - delay
        if seconds > BOUND:
            print(*(result.get("message") for rank in others for result in rank.results), sep="\n")
        return f"{' and '.join(sorted(how))}{'' if had_begun else ', killed before it met another'}", seconds

    return run


def processes_of(session: int) -> dict[int, int]:
    """Return the process id of each rank in a session; other processes of the session under negative numbers."""
    found = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            pid = int(folder.name)
            if os.getsid(pid) == session and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                variables = dict(line.partition("=")[::2] for line in (folder / "environ").read_text().split("\0"))
                found[int(variables.get("MLX_RANK", -pid))] = pid
    return found


def free_ports(count: int) -> int:
    """Return the first of consecutive ports that are free, outside those that connections are made from."""
    while True:
        first = random.randrange(12_000, 30_000)
        with suppress(OSError):
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            return first


def kill_one_of_launched(victim: int, delay: float, count: int) -> tuple[str, float]:
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(count), "--backend", "ring"]
    command = [sys.executable, "-m", "flash_moe_mlx", "generate", "--max-tokens", "100000", "Tell me a long story"]
    launcher = subprocess.Popen(
        [*launch, "-p", str(free_ports(count)), "--", *command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    try:
        while (pid := processes_of(launcher.pid).get(victim)) is None:
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        while processes_of(launcher.pid) and time.monotonic() - killed < 60:
            time.sleep(0.05)
        seconds = time.monotonic() - killed
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        said, _ = launcher.communicate()
    ends = {line.split("rank ", 1)[1].split()[0]: line for line in said.splitlines() if "[WARN] Node with rank" in line}
    own = [line.rpartition("code")[2].split()[0] if "code" in line else "killed" for line in ends.values()]
    return f"ends {' '.join(sorted(own))}{', typed' if 'all ranks must' in said else ''}", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--within", type=float, default=3.0, help="latest moment of a kill, seconds after the start")
    parser.add_argument("--launch", action="store_true", help="start them with mlx.launch")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    ends: Counter[str] = Counter()
    seconds = []
    with tempfile.TemporaryDirectory() as name, ranks_running() as ranks:
        directory = make_converted(Path(name), config=chat_config(num_experts=16, num_experts_per_tok=3), bits=4)
        kill = kill_one_of_launched if arguments.launch else kill_one_of_forked(ranks, directory, Path(name))
        for number in range(arguments.kills):
            victim, delay = rng.randrange(arguments.ranks), rng.uniform(0, arguments.within)
            how, late = kill(victim, delay, arguments.ranks)
            print(number, f"rank {victim} after {delay:.2f} s: {how}, {late:.1f} s later", flush=True)
            ends[how] += 1
            seconds.append(late)
    slow = [late for late in seconds if late > BOUND]
    print(f"{arguments.kills} kills: {dict(ends)}")
    print(f"median {statistics.median(seconds):.1f} s, slowest {max(seconds):.1f} s")
    if slow:
        sys.exit(f"{len(slow)} took longer than {BOUND:g} s: {[round(late, 1) for late in slow]}")


if __name__ == "__main__":
    main()

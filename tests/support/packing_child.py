"""A process that packs again and again, each time in a fork that is killed (SIGKILL) in the middle.

    python packing_child.py SOURCE FOLDER BITS SEED

FOLDER gets "counted", packed without a kill; eight results killed once, at random steps (calls that change the disk)
and at the last two; and "often", killed ten times, before each is packed to its end. A write is cut in half by its
kill. Prints how many steps a packing takes, and how many were killed.
"""

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from flash_moe_mlx.packing import dense, pack, plan, run

for module in (dense, plan):
    module.CHUNK_BYTES = 1 << 14
run._COMMIT_BYTES = 1 << 15


def count_steps(kill_at: int | None) -> list[int]:
    """Wrap what changes the disk. Returns a list that holds the number of steps so far."""
    steps = [0]

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def step(*arguments: Any, **options: Any) -> Any:
            steps[0] += 1
            if steps[0] == kill_at:
                if name == "pwrite":
                    fd, data, offset = arguments
                    original(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, name, step)

    for name in ("pwrite", "fsync", "replace", "truncate", "unlink", "mkdir", "rmdir", "open"):
        wrap(name)
    return steps


def run_to(source: Path, destination: Path, bits: int | None, kill_at: int | None) -> int:
    """Pack in a fork. Returns the signal that ended it, or 0; and writes the steps taken next to the destination."""
    # MLX has started no thread yet in this process, and never will: it may be forked.
    child = os.fork()
    if child == 0:
        steps = count_steps(kill_at)
        pack(source, destination, bits=bits, progress=False)
        destination.with_suffix(".steps").write_text(str(steps[0]))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"packing ended with {os.waitstatus_to_exitcode(status)}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill(source: Path, destination: Path, bits: int | None, moment: int) -> int:
    """Pack until a fork is killed at a step, and return 1. A run may take fewer steps: commits vary with the disk."""
    for _ in range(20):
        if run_to(source, destination, bits, moment) == signal.SIGKILL:
            return 1
        moment = min(moment, int(destination.with_suffix(".steps").read_text()))
        shutil.rmtree(destination)
    return 0


def main() -> None:
    source, folder, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4]
    bits = None if sys.argv[3] == "unchanged" else int(sys.argv[3])
    chosen = random.Random(seed)
    run_to(source, folder / "counted", bits, None)
    steps = int((folder / "counted.steps").read_text())
    killed = 0
    for moment in [*chosen.sample(range(1, steps - 1), 8), steps - 1, steps]:
        killed += kill(source, folder / f"killed-{moment}", bits, moment)
        run_to(source, folder / f"killed-{moment}", bits, None)
    for _ in range(10):
        killed += kill(source, folder / "often", bits, chosen.randrange(2, 30))
    run_to(source, folder / "often", bits, None)
    print(steps, killed)


if __name__ == "__main__":
    main()

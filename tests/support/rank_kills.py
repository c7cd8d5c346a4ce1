"""Kills of a random rank at random moments: every other rank must end with a DistributedError within its time.

python -m tests.support.rank_kills --kills 50
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from .models import chat_config, make_converted
from .ranks import ranks_running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--within", type=float, default=3.0, help="latest moment of a kill, seconds after the start")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    bad, slowest, finished = [], 0.0, 0
    with tempfile.TemporaryDirectory() as name, ranks_running() as ranks:
        scratch = Path(name)
        directory = make_converted(scratch, config=chat_config(num_experts=16, num_experts_per_tok=3), bits=4)
        for number in range(arguments.kills):
            victim, delay = rng.randrange(arguments.ranks), rng.uniform(0, arguments.within)

            def kill(pids: list[int], _: object, victim: int = victim, delay: float = delay) -> None:
                time.sleep(delay)
                if Path(f"/proc/{pids[victim]}").exists():
                    os.kill(pids[victim], signal.SIGKILL)

            ended = ranks.run(arguments.ranks, directory, scratch, {"do": "logits", "numba": False}, 200, during=kill)
            others = [rank for i, rank in enumerate(ended) if i != victim]
            errors = {result.get("error", "none") for rank in others for result in rank.results}
            if ended[victim].status == 0:
                finished += 1
            elif errors != {"DistributedError"}:
                bad.append((number, errors, [rank.stderr[-500:] for rank in others]))
            late = max(rank.seconds for rank in others) - delay
            slowest = max(slowest, late)
            print(number, f"rank {victim} after {delay:.2f} s: {errors}, ended {late:.1f} s later", flush=True)
    print(f"{arguments.kills} kills, {finished} after the end; slowest end {slowest:.1f} s; bad: {bad}")


if __name__ == "__main__":
    main()

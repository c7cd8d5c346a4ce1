"""Does plan() predict what is then measured? Decode of a full-size model in memory control groups, uniform routing.

    python -m benchmarks.plan_check                       # /tmp/w/s35full at 4 and 8 GiB, three times each
    python -m benchmarks.plan_check --folder DIR --case decode-12gib-uniform --alternations 1

Prints one tab-separated line a run: what was expected before it, what it did, and what would have been expected at the
hit rate that it had and of the disk as it was in the minutes around it; which of the parts is wrong can be read off.
Needs root, as control groups do. How to write the model: docs/performance.md.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.peers.cases import CASES, OVERHEAD_BYTES
from benchmarks.peers.engines import Places
from benchmarks.peers.measure import measure

from flash_moe_mlx.planning.planner import Planner

ALLOWED = 0.3
COLUMNS = (
    "case", "expected tok/s", "measured tok/s", "error", "hit rate expected", "measured", "disk GB/s expected",
    "measured", "tok/s expected with measured hit rate and disk", "weights GB/s",
    "ms per layer", "share waited for reads",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/w"), help="where s35full is")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--alternations", type=int, default=3)
    arguments = parser.parse_args()
    places = Places.under(arguments.folder)
    errors: dict[str, list[float]] = {}
    print("\t".join(COLUMNS))
    for _ in range(arguments.alternations):
        for name in arguments.case or ("decode-4gib-uniform", "decode-8gib-uniform"):
            case = CASES[name]
            if case.limit_bytes is None:
                parser.error(f"{name} has no limit")
            planner = Planner.open(
                places.checkpoint,
                memory_limit=case.limit_bytes - OVERHEAD_BYTES,
                max_context=case.prompt + case.warmup + case.tokens + 8,
            )
            expected = planner.at(planner.limit_bytes).expectations[-1]
            run = measure(case, "ours", places)
            if not run.tok_s or not expected.tokens_per_second:
                print(f"{name}\t{run.status} {run.note}", flush=True)
                continue
            error = expected.tokens_per_second / run.tok_s - 1
            errors.setdefault(name, []).append(error)
            speed = planner.speed
            disk = statistics.mean(filter(None, (run.disk_gb_s, run.disk_after_gb_s)))
            planner.speed = replace(speed, disk_bytes_per_second=disk * 1e9)
            row = (
                f"{expected.tokens_per_second:.2f}", f"{run.tok_s:.2f}", f"{error:+.0%}",
                f"{expected.hit_rate:.3f}", f"{run.hit_rate:.3f}", f"{(speed.disk_bytes_per_second or 0) / 1e9:.2f}",
                f"{disk:.2f}", f"{planner.tokens_per_second(run.hit_rate or 0.0) or 0:.2f}",
                f"{speed.weight_bytes_per_second / 1e9:.1f}", f"{1e3 * speed.layer_seconds:.2f}",
                f"{run.wait_share or 0:.0%}",
            )  # fmt: skip
            print(name, *row, sep="\t", flush=True)
    for name, of_case in errors.items():
        median = statistics.median(of_case)
        print(f"# {name}: median error {median:+.0%}, {'within' if abs(median) <= ALLOWED else 'NOT within'} 30 %")


if __name__ == "__main__":
    main()

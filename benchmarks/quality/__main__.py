"""Run cells, and sum them up.

    python -m benchmarks.quality run                                # all cells of the demo that are not finished
    python -m benchmarks.quality run --model wide=CHECKPOINT --jobs 16
    python -m benchmarks.quality run --only 4g64 2g64
    python -m benchmarks.quality sum                                # results.json, docs/quality.md's table and plot

Cases' lines are kept in ``--work`` (build/quality), and an interrupted run continues there.
"""

import argparse
import multiprocessing
import os
from pathlib import Path

from mlx_lm.utils import load_tokenizer

from .cases import load_cases
from .cells import SCRIPTS, Storage, cells, read_config
from .measure import pin, run_one

ROOT = Path(__file__).parents[2]


def run(options: argparse.Namespace) -> None:
    name, _, given = options.model.partition("=")
    source = Path(given) if given else SCRIPTS / "checkpoint"
    config = read_config(source)
    wanted = cells(config["num_experts_per_tok"], config["num_hidden_layers"])
    if options.only:
        wanted = [cell for cell in wanted if cell.name in options.only]
    wanted = [cell for cell in wanted if cell.name not in options.skip]
    store = options.work / name / "checkpoints"
    fused = Storage(16).write(source, store)
    load_cases(options.work / "cases.jsonl", load_tokenizer(fused))
    if options.jobs == 1:
        for cell in wanted:
            run_one(cell, cell.storage.write(source, store), options.work, name, options.calls)
        return
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(options.jobs)
    for i in range(options.jobs):
        cores.put(list(usable)[i % len(usable)])
    jobs = [(cell, cell.storage.write(source, store), options.work, name, options.calls) for cell in wanted]
    with context.Pool(options.jobs, pin, (cores,)) as pool:
        pool.starmap(run_one, jobs, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--model", default="demo", help="NAME, or NAME=DIRECTORY of the bfloat16 checkpoint")
    runs.add_argument("--only", nargs="*", help="names of cells")
    runs.add_argument("--skip", nargs="*", default=[], help="names of cells to leave out")
    runs.add_argument("--calls", action="store_true", help="run tool calls only, the first 500 cases")
    runs.add_argument("--jobs", type=int, default=1, help="cells at a time, one core each")
    runs.set_defaults(run=run)
    sums = commands.add_parser("sum")
    sums.set_defaults(run=sum_up)
    for command in (runs, sums):
        command.add_argument("--work", type=Path, default=ROOT / "build" / "quality")
    options = parser.parse_args()
    options.run(options)


def sum_up(options: argparse.Namespace) -> None:
    from .report import write_report

    write_report(options.work, ROOT)


if __name__ == "__main__":
    main()

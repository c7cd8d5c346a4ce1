"""This library, llama.cpp, mlx-lm and mlx-optiq on the same work, in alternation, under memory control groups.

    python -m benchmarks.peers run --folder /tmp/w --alternations 3          # everything: hours
    python -m benchmarks.peers run --case decode-8gib-uniform --engine ours --engine llama.cpp --alternations 1
    python -m benchmarks.peers table                                         # of all runs so far

Runs are appended to a TSV; the table takes medians over all of them. How to prepare the models: docs/performance.md.
"""

import argparse
import time
from pathlib import Path

from benchmarks.peers.cases import CASES
from benchmarks.peers.engines import ENGINES, Places
from benchmarks.peers.measure import Run, measure
from benchmarks.peers.table import plot, read_runs, table


def engines_of(case: str) -> list[str]:
    return ["ours", "mlx-lm", "mlx-optiq"] if case == "decode-resident" else ["ours", "llama.cpp", "llama.cpp-ra128"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, and append to the TSV")
    run.add_argument("--folder", type=Path, default=Path("/tmp/w"), help="of models and peers")
    run.add_argument("--case", choices=CASES, action="append")
    run.add_argument("--engine", choices=ENGINES, action="append")
    run.add_argument("--alternations", type=int, default=3)
    run.add_argument("--phase-seconds", type=float, default=45)
    run.add_argument("--limit-seconds", type=float, default=170)
    run.add_argument("--options", default="{}", help="more of our load_model's arguments, as JSON")
    show = commands.add_parser("table", help="the table of all runs")
    for command in (run, show):
        command.add_argument("--runs", type=Path, default=Path("peers.tsv"))
    show.add_argument("--plot", type=Path, help="write a picture too")
    show.add_argument("--commit", help="of ours, only runs of this one")
    arguments = parser.parse_args()
    if arguments.command == "table":
        runs = read_runs(arguments.runs, arguments.commit)
        print(table(runs))
        if arguments.plot:
            plot(runs, arguments.plot)
        return
    places = Places.under(arguments.folder)
    if not arguments.runs.exists():
        arguments.runs.write_text(Run.header() + "\n")
    for _ in range(arguments.alternations):
        for name in arguments.case or CASES:
            for engine in arguments.engine or engines_of(name):
                started = time.monotonic()
                done = measure(
                    CASES[name],
                    engine,
                    places,
                    extra=("--options", arguments.options) if engine == "ours" else (),
                    phase_seconds=arguments.phase_seconds,
                    limit_seconds=arguments.limit_seconds,
                )
                with open(arguments.runs, "a") as file:
                    file.write(done.row() + "\n")
                speed = "-" if done.tok_s is None else f"{done.tok_s:.3g} tok/s"
                seconds = time.monotonic() - started
                print(f"{name}\t{engine}\t{speed}\t{done.status}\t{done.note}\t{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""This library, llama.cpp, mlx-lm and mlx-optiq on the same work, in alternation, under memory control groups.

    python -m benchmarks.peers run --folder /tmp/w --alternations 3          # everything: hours
    python -m benchmarks.peers run --case decode-8gib-uniform --engine ours --engine llama.cpp --alternations 1
    python -m benchmarks.peers memory          # ours: anonymous memory within the limit + 0.6 GB, no OOM kill
    python -m benchmarks.peers experts         # ours: twice the experts, the same K and hit rate
    python -m benchmarks.peers table                                         # of all runs so far

Runs are appended to a TSV; the table takes medians over all of them. How to prepare the models: docs/performance.md.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.peers import checks
from benchmarks.peers.cases import CASES, Case
from benchmarks.peers.engines import ENGINES, Places
from benchmarks.peers.measure import Run, measure
from benchmarks.peers.simulated_disk import throttle
from benchmarks.peers.table import plot, read_runs, table


def engines_of(case: Case) -> list[str]:
    """Return our engine first, then those that the case's targets name."""
    return list(dict.fromkeys(["ours", *(name for own, peer, _ in case.targets for name in (own, peer))]))


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
    run.add_argument("--disk-gb-s", type=float, help="hold reading from the models' disk to this rate")
    run.add_argument("--options", default="{}", help="more of our load_model's arguments, as JSON")
    show = commands.add_parser("table", help="the table of all runs")
    memory = commands.add_parser("memory", help="does ours stay within its limit?")
    memory.add_argument("--folder", type=Path, default=Path("/tmp/w"))
    memory.add_argument("--limit-gib", type=int, action="append")
    memory.add_argument("--prompt", type=int, default=2048)
    memory.add_argument("--decode", type=int, default=256)
    experts = commands.add_parser("experts", help="does it cost anything to have more experts?")
    experts.add_argument("--folder", type=Path, default=Path("/tmp/w"))
    experts.add_argument("--layers", type=int, default=8)
    experts.add_argument("--alternations", type=int, default=3)
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
    if arguments.command == "memory":
        checks.memory(places, arguments.limit_gib or [4, 6, 8, 12], arguments.prompt, arguments.decode)
        return
    if arguments.command == "experts":
        checks.experts(places, arguments.folder / "experts", arguments.layers, arguments.alternations)
        return
    if not arguments.runs.exists():
        arguments.runs.write_text(Run.header() + "\n")
    if arguments.disk_gb_s:
        throttle(arguments.folder, arguments.disk_gb_s)
    derived = {case.prompt_is for case in CASES.values()}
    for _ in range(arguments.alternations):
        for name in arguments.case or [name for name in CASES if name not in derived]:
            for engine in arguments.engine or engines_of(CASES[name]):
                started = time.monotonic()
                done = measure(
                    CASES[name],
                    engine,
                    places,
                    extra=("--options", arguments.options) if engine.startswith("ours") else (),
                    phase_seconds=arguments.phase_seconds,
                    limit_seconds=arguments.limit_seconds,
                )
                with open(arguments.runs, "a") as file:
                    file.write(done.row() + "\n")
                    if prompt_is := CASES[name].prompt_is:
                        file.write(replace(done, case=prompt_is, tok_s=done.prompt_tok_s, tokens=0).row() + "\n")
                speed = "-" if done.tok_s is None else f"{done.tok_s:.3g} tok/s"
                seconds = time.monotonic() - started
                print(f"{name}\t{engine}\t{speed}\t{done.status}\t{done.note}\t{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()

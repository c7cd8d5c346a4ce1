"""Measures packing: at unchanged bits against copying the same files, and with quantisation.

    python -m benchmarks.packing SOURCE WORK_FOLDER --bits unchanged --bits 2 --bits 8

Source and results start on a cold page cache (written, synced and dropped). A copy is `cp` and `sync`; sides alternate.
Memory is the peak resident set of a process of its own.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from flash_moe_mlx import system

CHILD = """
import json, sys, time
from pathlib import Path
from flash_moe_mlx.packing import pack
from flash_moe_mlx.system import peak_resident_bytes
source, destination, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
begin, cpu = time.perf_counter(), time.process_time()
pack(source, destination, progress=False, **options)
print(json.dumps({"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu,
                  "peak_rss_gb": peak_resident_bytes() / 1e9}))
"""


def drop(folder: Path) -> None:
    """Write back and forget what the system has of a folder's files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            system.drop_pages(fd)
            os.close(fd)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy(source: Path, work: Path) -> float:
    target = work / "copy"
    drop(source)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    for path in target.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def pack(source: Path, work: Path, bits: str) -> dict[str, float]:
    target = work / "packed"
    drop(source)
    options = {"bits": None if bits == "unchanged" else int(bits)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, target, json.dumps(options)], check=True, stdout=subprocess.PIPE
    )
    result = json.loads(done.stdout) | {"result_bytes": size(target)}
    shutil.rmtree(target)
    return result


def kill(source: Path, work: Path, bits: str, times: int, seed: int) -> None:
    """Kill a packing at random moments, resume it, and compare the result with that of an undisturbed one."""
    chosen = random.Random(seed)
    options = json.dumps({"bits": None if bits == "unchanged" else int(bits)})

    def start(target: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CHILD, source, target, options], stdout=subprocess.DEVNULL)

    whole, killed = work / "whole", work / "killed"
    begin = time.perf_counter()
    start(whole).wait()
    seconds = time.perf_counter() - begin
    kills = []
    for number in range(times):
        child = start(killed)
        # Imports take the first seconds; each run gets about a share of the whole, and some more.
        moment = chosen.uniform(1.0, 2.0 + 1.5 * seconds / times)
        time.sleep(moment)
        child.kill()
        kills.append(child.wait() == -9)
        left = len(list((killed / ".flash-moe-pack").glob("journal"))) if killed.exists() else 0
        print(f"kill {number + 1} after {moment:.1f} s: killed {kills[-1]}, journal {bool(left)}")
    start(killed).wait()
    same = digests(whole) == digests(killed)
    print(f"{sum(kills)} of {times} killed; files equal to an uninterrupted packing's: {same}")
    shutil.rmtree(whole)
    shutil.rmtree(killed)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bits", action="append", default=[])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0, help="kill it so many times instead, and compare the result")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    if a.kills:
        kill(a.source, a.work, (a.bits or ["unchanged"])[0], a.kills, seed=0)
        return
    nbytes = size(a.source)
    copies: list[float] = []
    packs: dict[str, list[dict[str, float]]] = {bits: [] for bits in a.bits or ["unchanged"]}
    for _ in range(a.runs):
        copies.append(copy(a.source, a.work))
        print(f"copy {copies[-1]:.1f} s", flush=True)
        for bits, runs in packs.items():
            runs.append(pack(a.source, a.work, bits))
            print(f"pack, bits {bits}: {runs[-1]}", flush=True)
    gb = nbytes / 1e9
    print(f"source {gb:.2f} GB")
    print(f"copy: {gb / statistics.median(copies):.2f} GB/s, runs {[round(gb / s, 2) for s in copies]}")
    for bits, runs in packs.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        print(
            f"pack, bits {bits}: {gb / seconds:.2f} GB/s of the source, "
            f"runs {[round(gb / r['seconds'], 2) for r in runs]}, "
            f"{statistics.median(copies) / seconds:.0%} of the copy's rate; "
            f"{statistics.median(r['cpu_seconds'] / r['seconds'] for r in runs):.2f} cores busy; "
            f"peak {max(r['peak_rss_gb'] for r in runs):.2f} GB; result {runs[0]['result_bytes'] / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()

"""A disk of one steady rate, in memory, and models on it: for machines whose own disk is throttled or too slow.

    python -m benchmarks.peers.simulated_disk D/s35full D/s35-0000?-of-00002.gguf   # as root; makes and mounts it
    python -m benchmarks.peers run --folder /mnt/simulated --disk-gb-s 4

The disk is a zram device with ext4. Dense tensors are copied; experts' weights are zeros, which zram keeps in no
memory: 40 GB of models take about 3. Speed doesn't depend on them, and routing stays what routers and dense layers make
of random tokens. Reads are copies by the processor, at over 10 GB/s a core, and have no latency; the kernel's block
throttling (cgroup v1) holds them to the asked rate. So it stands for a disk at that rate with little else to wait for,
and favours whoever asks for few bytes, not whoever asks in few requests. Figures on it are labelled with its rate.
"""

import argparse
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from flash_moe_mlx.formats.safetensors_header import read_header

SIZE = "64G"
THROTTLES = Path("/sys/fs/cgroup/blkio")
_PIECE = 16 << 20


def make(mount: Path) -> None:
    """Add a zram device, format and mount it."""
    number = Path("/sys/class/zram-control/hot_add").read_text().strip()
    Path(f"/sys/block/zram{number}/disksize").write_text(SIZE)
    device = f"/dev/zram{number}"
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-E", "nodiscard", device], check=True)
    mount.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-o", "noatime,discard", device, str(mount)], check=True)


def throttle(folder: Path, gb_s: float) -> None:
    """Hold this process and its children to a rate of reading from the disk that holds a folder, in GB/s."""
    number = folder.stat().st_dev
    group = THROTTLES / "flash-moe-peers"
    group.mkdir(exist_ok=True)
    rate = f"{os.major(number)}:{os.minor(number)} {round(gb_s * 1e9)}"
    (group / "blkio.throttle.read_bps_device").write_text(rate)
    (group / "cgroup.procs").write_text(str(os.getpid()))


def copy(source: Path, target: Path, made: dict[int, Path]) -> None:
    """Copy a file, or a folder of files, with zeros for experts; links between files stay links."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for path in sorted(source.iterdir()):
            copy(path, target / path.name, made)
        return
    inode = source.stat().st_ino
    if inode in made:
        os.link(made[inode], target)
        return
    made[inode] = target
    with source.open("rb") as read, target.open("wb") as written:
        done = 0
        for begin, end in [*sorted(_expert_ranges(source)), (source.stat().st_size,) * 2]:
            while done < begin:
                done += written.write(os.pread(read.fileno(), min(_PIECE, begin - done), done))
            while done < end:
                done += written.write(bytes(min(_PIECE, end - done)))
        written.flush()
        os.fsync(written.fileno())
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _expert_ranges(path: Path) -> Iterator[tuple[int, int]]:
    if path.suffix == ".safetensors":
        for name, tensor in read_header(path).items():
            if ".switch_mlp." in name:
                yield tensor.offset, tensor.offset + tensor.nbytes
    elif path.suffix == ".gguf":
        from gguf import GGUFReader

        for tensor in GGUFReader(path).tensors:
            if "_exps" in tensor.name:
                yield int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of safetensors, files of GGUF")
    parser.add_argument("--mount", type=Path, default=Path("/mnt/simulated"))
    arguments = parser.parse_args()
    if not arguments.mount.is_mount():
        make(arguments.mount)
    made: dict[int, Path] = {}
    for model in arguments.models:
        copy(model, arguments.mount / model.name, made)
        print(arguments.mount / model.name, flush=True)


if __name__ == "__main__":
    main()

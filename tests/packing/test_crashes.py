"""Whatever ends a packing, at any moment: running it again ends in the same bytes, or a typed error says why not."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flash_moe_mlx import pack, verify
from flash_moe_mlx.errors import CorruptError, DiskFullError, MissingTensorError, PackError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.formats.packed_format import WORK_FOLDER
from flash_moe_mlx.packing import workspace
from flash_moe_mlx.packing.journal import Journal
from flash_moe_mlx.packing.quantiser import ErrorSums
from flash_moe_mlx.packing.tasks import TaskResult

from ..support.checkpoints import make_checkpoint
from ..support.models import chat_config
from ..support.packing import contents, small_tasks, stop_at

CHILD = Path(__file__).parent.parent / "support" / "packing_child.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = chat_config(dtype="bfloat16", num_hidden_layers=2, full_attention_interval=2)
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", "hf-fused", config=config, shards=3)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(pack(source, tmp_path_factory.mktemp("expected") / "packed", bits=4))


@pytest.mark.skipif(sys.platform == "darwin", reason="forks and then uses MLX, which Metal doesn't support")
@pytest.mark.parametrize("bits", ["4", "unchanged"])
def test_killed_at_twenty_moments(source: Path, tmp_path: Path, bits: str):
    """Ten packings, each killed once, at its last steps too; and one that is killed ten times before it may end."""
    done = subprocess.run(
        [sys.executable, CHILD, source, tmp_path, bits, "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    steps, killed = map(int, done.stdout.split())
    assert steps > 50
    assert killed == 20
    expected = contents(tmp_path / "counted")
    results = [tmp_path / "often", *(path for path in tmp_path.glob("killed-*") if path.is_dir())]
    assert len(results) == 11
    for packed in results:
        assert contents(packed) == expected, packed.name


def test_an_unfinished_packing_is_no_checkpoint(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small_tasks(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "packed", bits=4, progress=stop_at(0.5))
    assert os.listdir(tmp_path / "packed") == [WORK_FOLDER]
    with pytest.raises(MissingTensorError, match="packed completely, got an unfinished packing"):
        Checkpoint.open(tmp_path / "packed")
    assert not verify(tmp_path / "packed")
    seen = []
    pack(source, tmp_path / "packed", bits=4, progress=seen.append)
    assert contents(tmp_path / "packed") == expected
    assert seen[0].done > 0.3 * seen[0].total  # it continued instead of starting again


def test_bytes_reach_the_disk_before_the_journal_speaks_of_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And everything else before the manifest has its name."""
    small_tasks(monkeypatch)
    unsynced: set[str] = set()
    pwrite, fsync, append, replace = os.pwrite, os.fsync, Journal.append, os.replace
    noted = []

    def name_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def watch_pwrite(fd: int, data: Any, offset: int) -> int:
        unsynced.add(name_of(fd))
        return pwrite(fd, data, offset)

    def watch_fsync(fd: int) -> None:
        fsync(fd)
        unsynced.discard(name_of(fd))

    def watch_append(self: Journal, results: Any) -> None:
        tasks = packing_tasks
        noted.append({Path(tasks[number].output).name for number in results if number < len(tasks)})
        append(self, results)

    def watch_replace(old: Any, new: Any) -> None:
        if Path(new).name == "experts.json":
            assert unsynced == set()
        replace(old, new)

    from flash_moe_mlx.packing import run

    packing_tasks: list[Any] = []
    original = run.Runner.__init__

    def note_tasks(self: Any, plan: Any, *arguments: Any) -> None:
        packing_tasks[:] = plan.tasks
        original(self, plan, *arguments)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name what is written")
    synced: list[set[str]] = []

    def watch_sync(self: workspace.Workspace, names: Any) -> None:
        names = set(names)
        sync(self, names)
        synced.append({Path(name).name for name in names})

    sync = workspace.Workspace.sync
    monkeypatch.setattr(run.Runner, "__init__", note_tasks)
    monkeypatch.setattr(workspace.Workspace, "sync", watch_sync)
    monkeypatch.setattr(os, "pwrite", watch_pwrite)
    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    monkeypatch.setattr(Journal, "append", watch_append)
    pack(source, tmp_path / "packed", bits=4)
    assert len(noted) >= 3
    for files, before in zip(noted, synced, strict=False):
        assert files <= before


@pytest.mark.parametrize("damage", ["torn", "flipped", "garbage"])
def test_a_damaged_journal_is_used_as_far_as_it_is_whole(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    small_tasks(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "packed", bits=4, progress=stop_at(0.8))
    journal = tmp_path / "packed" / WORK_FOLDER / "journal"
    data = bytearray(journal.read_bytes())
    if damage == "torn":
        del data[len(data) * 2 // 3 :]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data += b"\x00" * 100
    journal.write_bytes(data)
    pack(source, tmp_path / "packed", bits=4)
    assert contents(tmp_path / "packed") == expected


def test_a_file_that_somebody_removed_is_made_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And does not stay the zeros that a new file is, whatever the journal says."""
    small_tasks(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "packed", bits=4, progress=stop_at(0.9))
    (tmp_path / "packed" / WORK_FOLDER / "experts" / "layer_00.safetensors").unlink()
    pack(source, tmp_path / "packed", bits=4)
    assert contents(tmp_path / "packed") == expected


def test_nothing_is_noted_after_a_failed_fsync(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The system tells of lost bytes once: a second fsync of the file succeeds, though they are gone."""
    fsync, noted, failed = os.fsync, [], []
    append = Journal.append

    def fail_once(fd: int) -> None:
        if len(noted) == 1 and not failed:
            failed.append(fd)
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    def note(self: Journal, results: Any) -> None:
        noted.append(results)
        append(self, results)

    small_tasks(monkeypatch)
    monkeypatch.setattr(os, "fsync", fail_once)
    monkeypatch.setattr(Journal, "append", note)
    with pytest.raises(PackError, match="must be writable"):
        pack(source, tmp_path / "packed", bits=4)
    assert len(noted) == 1 and failed
    pack(source, tmp_path / "packed", bits=4)
    assert contents(tmp_path / "packed") == expected


def test_journal_keeps_results_to_the_bit(tmp_path: Path):
    result = TaskResult((0, 2**32 - 1), {"up_proj": ErrorSums(3, 0.1, 1 / 3, 2e-9)})
    journal = Journal(tmp_path / "journal", {"a": 1})
    journal.append({7: result})
    journal.close()
    again = Journal(tmp_path / "journal", {"a": 1})
    assert again.results == {7: result}
    again.close()
    with pytest.raises(PackError, match="the same a, got 2 where it was 1"):
        Journal(tmp_path / "journal", {"a": 2})


# --- somebody else ---


def test_two_packers(source: Path, tmp_path: Path):
    with workspace.locked(tmp_path / "packed", restart=False):
        with pytest.raises(PackError, match="by one process at a time"):
            pack(source, tmp_path / "packed")
        code = "import sys; from flash_moe_mlx import pack; pack(sys.argv[1], sys.argv[2])"
        done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "packed"], capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 1 and "PackError" in done.stderr
    assert verify(pack(source, tmp_path / "packed"), full=True)


def test_other_settings(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_tasks(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "packed", bits=4, progress=stop_at(0.5))
    with pytest.raises(PackError, match="the same settings bits, got 8 where it was 4"):
        pack(source, tmp_path / "packed", bits=8)
    pack(source, tmp_path / "packed", bits=8, restart=True)
    assert verify(tmp_path / "packed", full=True, against=source)


def replace_shard(directory: Path, *, keep_time: bool) -> Path:
    """Another file in a shard's place: one bit of its last block, and the length it had."""
    path = sorted(directory.glob("*.safetensors"))[1]
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-70_000:] = bytes(byte ^ 1 for byte in data[-70_000:])
    path.with_suffix(".new").write_bytes(data)
    os.replace(path.with_suffix(".new"), path)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return path


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_shard_replaced_between_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_time: bool):
    small_tasks(monkeypatch)
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    with pytest.raises(KeyboardInterrupt):
        pack(copy, tmp_path / "packed", bits=4, progress=stop_at(0.5))
    path = replace_shard(copy, keep_time=keep_time)
    with pytest.raises(PackError, match=rf"the same source {path.name}"):
        pack(copy, tmp_path / "packed", bits=4)
    pack(copy, tmp_path / "packed", bits=4, restart=True)
    assert verify(tmp_path / "packed", full=True, against=copy)


def test_a_shard_replaced_while_it_is_packed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_tasks(monkeypatch)
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    replaced = []

    def report(moment: Any) -> None:
        if not replaced and moment.done > moment.total / 2:
            replaced.append(replace_shard(copy, keep_time=False))

    with pytest.raises(PackError, match="must stay as it is while it is packed"):
        pack(copy, tmp_path / "packed", bits=4, progress=report)
    assert os.listdir(tmp_path / "packed") == [WORK_FOLDER]


def test_a_shard_cut_short_while_it_is_packed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_tasks(monkeypatch)
    copy = Path(shutil.copytree(source, tmp_path / "source"))

    def report(moment: Any) -> None:
        for path in copy.glob("*.safetensors"):
            os.truncate(path, 1000)

    with pytest.raises(CorruptError, match="it is truncated"):
        pack(copy, tmp_path / "packed", bits=4, progress=report)


# --- a full disk ---


def test_a_disk_that_is_too_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_000_000))
    with pytest.raises(DiskFullError, match=r"must have .* free, got 1\.00 MB: .* are missing") as caught:
        pack(source, tmp_path / "packed", bits=4)
    assert caught.value.missing_bytes > 16e6


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_no_space_left(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    """Said by any write, or only when it is to reach the disk."""
    original, calls = getattr(os, call), []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    small_tasks(monkeypatch)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskFullError, match="the same command continues where it stopped"):
        pack(source, tmp_path / "packed", bits=4)
    monkeypatch.setattr(os, call, original)
    pack(source, tmp_path / "packed", bits=4)
    assert contents(tmp_path / "packed") == expected


def test_a_failing_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(PackError, match=r"must be writable, got .*Input/output error") as caught:
        pack(source, tmp_path / "packed", bits=4)
    assert not isinstance(caught.value, DiskFullError)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB in a file, mounted; skipped where that is not permitted."""
    image, mounted = tmp_path / "disk.img", tmp_path / "disk"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(24 << 20)
    for command in (["mkfs.ext4", "-q", "-m", "0", image], ["mount", "-o", "loop", image, mounted]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"needs {error.filename}")
        if done.returncode:
            pytest.skip(f"{command[0]} is not permitted here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def test_a_small_file_system_that_fills_up(
    source: Path, expected: dict[str, bytes], small_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    small_tasks(monkeypatch)
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(b"\1" * (free - 700_000))
    with pytest.raises(DiskFullError, match="are missing") as caught:  # told before anything is written
        pack(source, small_disk / "packed", bits=4)
    assert caught.value.missing_bytes > 0
    with monkeypatch.context() as blind:
        blind.setattr(workspace.Workspace, "need", lambda self, nbytes: None)
        with pytest.raises(DiskFullError, match="are missing") as caught:  # and by the system's own ENOSPC
            pack(source, small_disk / "packed", bits=4)
    assert caught.value.__cause__ is not None and caught.value.__cause__.errno == errno.ENOSPC
    assert caught.value.missing_bytes > 0
    with pytest.raises(MissingTensorError, match="unfinished"):
        Checkpoint.open(small_disk / "packed")
    ballast.unlink()
    pack(source, small_disk / "packed", bits=4)
    assert contents(small_disk / "packed") == expected


def test_the_lock_is_given_back(source: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "packed", progress=stop_at(0))
    lock = os.open(tmp_path / "packed", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)

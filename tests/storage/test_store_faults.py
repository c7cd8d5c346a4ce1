"""The faults of disks, files and people that an `ExpertStore` meets, and what it leaves behind."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flash_moe_mlx.errors import RequestError, ShortReadError, StoreError
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.storage.store import MAX_PIECE_BYTES, READ_MODES, ExpertStore

from ..support.checkpoints import make_checkpoint, write_checkpoint
from ..support.stores import FaultyPreadv, expected_parts, make_store, parts_of, request_for


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Records of 6 MiB, which several threads read at once."""
    weight = mx.random.normal((3, 1024, 1024), key=mx.random.key(1)).astype(mx.bfloat16)
    stem = "language_model.model.layers.0.mlp.switch_mlp"
    tensors = {f"{stem}.{name}_proj.weight": weight * scale for name, scale in (("gate", 1), ("up", 2), ("down", 3))}
    config = {"model_type": "qwen3_5_moe", "num_hidden_layers": 1}
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("large"), config, tensors))


every_io = pytest.mark.parametrize("io", READ_MODES)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int, int], int | None]], FaultyPreadv]:
    def inject(fault: Callable[[int, int, int], int | None]) -> FaultyPreadv:
        preadv = FaultyPreadv(fault)
        monkeypatch.setattr(os, "preadv", preadv)
        return preadv

    return inject


@every_io
def test_large_records_are_read_by_several_threads(large: Checkpoint, io: str):
    expected = expected_parts(large)
    with make_store(large, io, num_threads=4) as store:
        requests = [request_for(large, 0, expert) for expert in range(3)]
        pieces = [piece for job in store._split([r.buffer for r in requests], [large.ranges(0, e) for e in range(3)])
                  for piece in job]  # fmt: skip
        store.read_into(requests)
        for request in requests:
            assert parts_of(large, request) == expected[0, request.expert]
    assert len(pieces) >= 18
    assert max(len(piece.target) for piece in pieces) <= MAX_PIECE_BYTES


def test_threads_share_one_record_and_small_reads_share_one_thread(large: Checkpoint, faults: Any, tmp_path: Path):
    names = set()

    def fault(number: int, offset: int, nbytes: int) -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.02)

    preadv = faults(fault)
    with ExpertStore(large, num_threads=4) as store:
        store.read_into([request_for(large, 0, 0)])
    assert len(names) == 4
    assert all(name.startswith("flash-moe-io") for name in names)
    assert 6 <= preadv.calls <= 8
    names.clear()
    tiny = Checkpoint.open(make_checkpoint(tmp_path, bits=4))
    with ExpertStore(tiny, num_threads=4) as store:
        store.read_into([request_for(tiny, 0, expert) for expert in range(3)])
    assert len(names) == 1


@pytest.mark.parametrize("io", ["pread", "direct"])
def test_short_and_interrupted_reads_are_continued(large: Checkpoint, faults: Any, io: str):
    def fault(number: int, offset: int, nbytes: int) -> int | None:
        if number % 5 == 1:
            raise InterruptedError
        if number % 3 == 1:  # a direct read ends at a block, except at the file's end
            return 8192 if io == "direct" else 777
        return None

    expected = expected_parts(large)
    with make_store(large, io, num_threads=3) as store:
        preadv = faults(fault)
        request = request_for(large, 0, 2)
        assert store.read_into([request]) == large.layout(0).payload_bytes
        assert parts_of(large, request) == expected[0, 2]
    assert preadv.calls >= 10  # of 6 pieces


@pytest.mark.parametrize("io", ["pread", "direct"])
def test_failing_disk(large: Checkpoint, faults: Any, io: str):
    bad = large.ranges(0, 1)[1]

    def fault(number: int, offset: int, nbytes: int) -> None:
        # Not at the edges, where a direct read takes some of the neighbour's bytes along.
        if bad.file_offset + 4096 <= offset < bad.file_offset + bad.nbytes - 4096:
            raise OSError(errno.EIO, "Input/output error")

    with make_store(large, io, num_threads=3) as store:
        faults(fault)
        pending = store.submit([request_for(large, 0, expert) for expert in range(3)])
        with pytest.raises(StoreError, match=r"layer 0 expert 1: \d+ bytes at offset \d+ of model") as caught:
            pending.wait()
        assert isinstance(caught.value.__cause__, OSError)
        assert not isinstance(caught.value, ShortReadError)
        assert pending.completed == (True, False, True)
        with pytest.raises(StoreError, match="expert 1"):  # asked again, the same answer
            pending.wait()
        assert store.read_into([request_for(large, 0, 0)]) == large.layout(0).payload_bytes  # and continues


def copy_of(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    for path in checkpoint.directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return Checkpoint.open(directory)


@every_io
def test_truncated_file(large: Checkpoint, tmp_path: Path, io: str):
    """Also of one that shrinks while it is mapped: no SIGBUS."""
    checkpoint = copy_of(large, tmp_path)
    (path,) = checkpoint.expert_files
    store = make_store(checkpoint, io, num_threads=2)
    store.read_into([request_for(checkpoint, 0, 2)])
    os.truncate(path, path.stat().st_size - 1)  # the last piece alone is short, and by one byte
    with pytest.raises(ShortReadError):
        store.read_into([request_for(checkpoint, 0, expert) for expert in range(3)])
    last = max((r for e in range(3) for r in checkpoint.ranges(0, e)), key=lambda r: r.file_offset)
    os.truncate(path, last.file_offset + 12345)
    expert = next(e for e in range(3) if last in checkpoint.ranges(0, e))
    with store:
        with pytest.raises(ShortReadError) as caught:
            store.read_into([request_for(checkpoint, 0, expert)])
        assert f"[ExpertStore] layer 0 expert {expert}: expected " in str(caught.value)
        assert f"of {path.name}, got " in str(caught.value)
        assert "The file is truncated; " in str(caught.value)
        os.truncate(path, 100)
        with pytest.raises(ShortReadError, match="got 0"):
            store.read_into([request_for(checkpoint, 0, expert)])


def test_file_that_changed_since_its_header_was_read(large: Checkpoint, tmp_path: Path):
    checkpoint = copy_of(large, tmp_path)
    (path,) = checkpoint.expert_files
    size = path.stat().st_size
    others = io_threads()
    os.truncate(path, size + 1)
    with pytest.raises(StoreError, match=f"must have {size} bytes.*another one now; open the checkpoint again"):
        ExpertStore(checkpoint)
    os.truncate(path, size - 1)
    with pytest.raises(ShortReadError, match=f"got {size - 1}. The file is truncated"):
        ExpertStore(checkpoint)
    assert not io_threads() - others


@every_io
def test_vanished_file(large: Checkpoint, tmp_path: Path, io: str):
    checkpoint = copy_of(large, tmp_path)
    with make_store(checkpoint, io) as store:
        checkpoint.expert_files[0].unlink()  # what is open stays readable
        request = request_for(checkpoint, 0, 1)
        store.read_into([request])
        assert parts_of(checkpoint, request) == expected_parts(large)[0, 1]
    with pytest.raises(StoreError, match=r"must be readable, got .*No such file"):
        ExpertStore(checkpoint, io=io)


def test_failed_batch_leaves_no_thread_writing(large: Checkpoint, faults: Any):
    def fault(number: int, offset: int, nbytes: int) -> None:
        if number == 0:
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.02)

    with ExpertStore(large, num_threads=4) as store:
        preadv = faults(fault)
        request = request_for(large, 0, 0)
        with pytest.raises(StoreError):
            store.read_into([request])
        assert preadv.running == 0
        request.buffer[:] = bytes(len(request.buffer))
        time.sleep(0.1)
        assert not any(request.buffer)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_interrupt_waits_for_running_reads(large: Checkpoint, faults: Any):
    submitted = threading.Event()

    def fault(number: int, offset: int, nbytes: int) -> None:
        time.sleep(0.25)

    def interrupt() -> None:
        submitted.wait()
        time.sleep(0.05)
        for _ in range(2):  # an impatient user
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.03)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ExpertStore(large, num_threads=2) as store:
            preadv = faults(fault)
            requests = [request_for(large, 0, expert) for expert in range(3)]
            pending = store.submit(requests)
            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the interrupt may come right after set()
                submitted.set()
                pending.wait()
            running, calls = preadv.running, preadv.calls
            thread.join()
            assert running == 0
            assert calls <= 4  # of 18: what had not begun was dropped
            assert pending.done()
            assert not all(pending.completed)
            with pytest.raises(StoreError, match="given up by close"):
                pending.wait()
            for request in requests:
                request.buffer[:] = bytes(len(request.buffer))
            time.sleep(0.4)
            assert preadv.calls == calls
            assert not any(any(request.buffer) for request in requests)
            preadv.fault = lambda *_: None
            assert store.read_into(requests) > 0  # usable for the next request
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt_while_submitting(large: Checkpoint, faults: Any, monkeypatch: pytest.MonkeyPatch):
    preadv = faults(lambda number, offset, nbytes: time.sleep(0.05))
    with ExpertStore(large, num_threads=2) as store:
        real_submit, taken = store._threads.submit, []

        def submit(*job: Any) -> Any:
            taken.append(real_submit(*job))
            if len(taken) == 3:  # after the pool has taken the job, before the store knows
                raise KeyboardInterrupt
            return taken[-1]

        monkeypatch.setattr(store._threads, "submit", submit)
        requests = [request_for(large, 0, expert) for expert in range(3)]
        with pytest.raises(KeyboardInterrupt):
            store.submit(requests)
        assert preadv.running == 0
        calls = preadv.calls
        assert calls <= 3
        time.sleep(0.15)
        assert preadv.calls == calls


def test_drain_waits_for_what_nobody_holds(large: Checkpoint, faults: Any):
    preadv = faults(lambda number, offset, nbytes: time.sleep(0.05))
    with ExpertStore(large, num_threads=2) as store:
        request = request_for(large, 0, 0)
        store.submit([request])
        while not preadv.calls:
            time.sleep(0.001)
        store.drain()
        assert preadv.running == 0
        assert preadv.calls < 6  # what had not begun is dropped
        request.buffer[:] = bytes(len(request.buffer))
        time.sleep(0.1)
        assert not any(request.buffer)
        assert store.read_into([request]) == large.layout(0).payload_bytes


def test_close_while_reads_are_under_way(large: Checkpoint, faults: Any):
    entered = threading.Event()

    def fault(number: int, offset: int, nbytes: int) -> None:
        entered.set()
        time.sleep(0.1)

    preadv = faults(fault)
    store = ExpertStore(large, num_threads=2)
    pending = store.submit([request_for(large, 0, expert) for expert in range(3)])
    entered.wait()
    store.close()
    assert preadv.running == 0
    assert pending.done()
    with pytest.raises(StoreError, match=r"must be read to its end, got one given up by close\(\)"):
        pending.wait()


def open_descriptors() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }


def io_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("flash-moe-io")}


def count_descriptors() -> int:
    gc.collect()  # what other tests dropped may still be open
    return len(os.listdir("/dev/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@every_io
def test_close_leaves_nothing_behind(large: Checkpoint, io: str):
    path = str(large.expert_files[0].resolve())
    gc.collect()
    assert path not in open_descriptors()
    others = io_threads()
    for _ in range(3):
        store = make_store(large, io, num_threads=3)
        store.read_into([request_for(large, 0, 0)])
        assert path in open_descriptors()
        assert len(io_threads() - others) in (1, 2, 3)
        assert (store.buffer_bytes > 0) == (io == "direct")
        store.close()
        assert not io_threads() - others
        assert store.buffer_bytes == 0
        assert path not in Path("/proc/self/maps").read_text()
        assert path not in open_descriptors()
    store = make_store(large, io, num_threads=3)
    store.read_into([request_for(large, 0, 0)])
    with pytest.warns(ResourceWarning):
        del store  # not closed: a warning, but no leak
        gc.collect()
    assert path not in open_descriptors()
    assert path not in Path("/proc/self/maps").read_text()


def test_one_descriptor_a_file(tmp_path: Path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, shards=4))
    before = count_descriptors()
    with ExpertStore(checkpoint, num_threads=2) as store:
        for layer in checkpoint.moe_layers:
            store.read_into([request_for(checkpoint, layer, expert) for expert in range(8)])
        assert count_descriptors() - before == len(checkpoint.expert_files) <= 4
    assert count_descriptors() == before


def test_no_store_left_half_open(tmp_path: Path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, shards=4))
    checkpoint.expert_files[-1].unlink()
    before, others = count_descriptors(), io_threads()
    with pytest.raises(StoreError, match="must be readable"):
        ExpertStore(checkpoint)
    assert count_descriptors() == before
    assert not io_threads() - others


def test_interpreter_ends_though_a_store_is_open(large: Checkpoint):
    code = f"""
from pathlib import Path
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.storage.store import ExpertStore, ReadRequest
checkpoint = Checkpoint.open(Path({str(large.directory)!r}))
store = ExpertStore(checkpoint)
buffer = memoryview(bytearray(checkpoint.layout(0).record_bytes))
store.submit([ReadRequest(0, 0, buffer)])
print(buffer.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{large.layout(0).record_bytes}\n", "")


def test_options(large: Checkpoint):
    with pytest.raises(RequestError, match="io must be one of mmap, pread, direct, got 'auto'"):
        ExpertStore(large, io="auto")
    for number in (0, -1, 2.5, True, "8"):
        with pytest.raises(RequestError, match="num_threads must be at least 1"):
            ExpertStore(large, num_threads=number)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs O_DIRECT")
def test_file_system_without_direct_io(large: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=r'io="direct" must be possible .* Use io="pread"'):
        ExpertStore(large, io="direct")
    ExpertStore(large, io="pread").close()


def test_counters_of_overlapping_batches(large: Checkpoint, faults: Any):
    faults(lambda number, offset, nbytes: time.sleep(0.05))
    with ExpertStore(large, num_threads=8) as store:
        start = time.perf_counter()
        batches = [store.submit([request_for(large, 0, expert)]) for expert in range(3)]
        total = sum(batch.wait() for batch in batches)
        elapsed = time.perf_counter() - start
        assert store.bytes_read == total == 3 * large.layout(0).payload_bytes
        assert 0.05 <= store.read_seconds <= elapsed  # time in which anything was read, counted once


def test_an_ended_batch_may_be_given_up_again(large: Checkpoint):
    """`close` and `drain` may come while the last read ends."""
    with ExpertStore(large, num_threads=2) as store:
        pending = store.submit([request_for(large, 0, 0)])
        pending.wait()
        before = store.bytes_read, store.read_seconds
        pending._drop()
        assert (store.bytes_read, store.read_seconds) == before
        assert pending.wait() == before[0]


def test_a_fault_of_the_library_is_not_swallowed(large: Checkpoint, faults: Any):
    def fault(number: int, offset: int, nbytes: int) -> None:
        raise ZeroDivisionError

    faults(fault)
    with ExpertStore(large, num_threads=2) as store, pytest.raises(ZeroDivisionError):
        store.read_into([request_for(large, 0, 0)])

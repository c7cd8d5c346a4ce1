"""Threads, processors and the absence of numba."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.ops import cpu
from flash_moe_mlx.ops.dequant_matvec import dequant_matvec, dequant_matvec_reference

numba = pytest.importorskip("numba")

from flash_moe_mlx.ops.cpu import threads  # noqa: E402


def test_every_task_runs_once_and_is_finished():
    lock, counts = threading.Lock(), np.zeros(1000, int)

    def kernel(label: str, state: np.ndarray) -> int:
        while True:
            with lock:
                task = int(state[0])
                state[0] += 1
            if task >= len(counts):
                return len(counts)
            counts[task] += 1
            with lock:
                state[1] += 1

    for _ in range(5):
        threads.run(kernel, "label")
    assert (counts == 5).all()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_kernel_that_raises_costs_no_thread(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "num_threads", lambda: 3)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    main, entered = threading.main_thread(), threading.Event()

    def kernel(state: np.ndarray) -> int:
        is_here = threading.current_thread() is main
        if where == "elsewhere" and is_here:
            entered.wait(10)
            return 1000  # tasks that others have drawn
        if where == "here" and not is_here:
            return 1000
        entered.set()
        raise MemoryError("planted")

    for _ in range(20):
        entered.clear()
        with pytest.raises(MemoryError, match="planted"):
            threads.run(kernel)
    time.sleep(0.5)  # a thread whose kernel raised takes its queue away a moment after its caller was told
    counts: set[int] = set()
    barrier = threading.Barrier(3, timeout=20)

    def meet(state: np.ndarray) -> int:
        barrier.wait()
        counts.add(threading.get_ident())
        return 0

    threads.run(meet)
    assert threading.get_ident() in counts


@pytest.mark.parametrize("spins", [1, 100_000])
def test_waiting_ends_when_it_is_over(spins: int) -> None:
    state = np.zeros(1, np.int64)
    threading.Timer(0.02, lambda: state.__setitem__(0, spins)).start()
    threads.wait_for(state.ctypes.data, spins, 1000)
    assert state[0] == spins


def test_a_thread_that_waits_leaves_its_core_to_the_one_it_waits_for():
    """Two threads on one core, as under a quota that is rounded up. If they only spun, each wait took a time slice."""
    code = """
        import os, time
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import numpy as np
        from flash_moe_mlx.ops.cpu import decode_tasks, threads
        from flash_moe_mlx.ops.cpu.program import Operation, Program
        threads.num_threads = lambda: 2
        x, weight, y = (np.ones(1 << 14, np.float32) for _ in range(3))
        operations = [
            Operation(decode_tasks.norm, 1, x, 0, weight, x.size, 0.0, y, nbytes=1 << 20) for _ in range(2000)
        ]
        program = Program(operations)
        program.run()
        began = time.process_time()
        for _ in range(4):
            program.run()
        print(time.process_time() - began)
    """
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs sched_setaffinity (Linux)")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300, capture_output=True, text=True
    )
    # Processor time, so that other processes don't matter: 0.1 s here, and 8,000 time slices of 3 ms if they only spun.
    assert float(done.stdout) < 3


def test_a_fork_has_threads_of_its_own():
    code = """
        import os, mlx.core as mx, numpy as np
        from flash_moe_mlx.ops.cpu.matmul import dense_matmul
        weight, x = mx.ones((64, 64)), mx.ones((1, 64))
        mx.eval(weight, x)
        dense_matmul(x, weight)
        child = os.fork()
        if child == 0:
            from flash_moe_mlx.ops.cpu import threads
            threads.run(lambda state: 0)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("files", "membership", "cpus"),
    [
        ({"a/cpu.max": "150000 100000", "cpu.max": "max 100000"}, "0::/a/b\n", 1.5),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "200000 100000"}, "0::/a/b\n", 2),
        ({"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/a\n", 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n2:memory:/\n", None),
        ({}, "0::/\n", None),
    ],
)
def test_cgroup_quotas(tmp_path: Path, files, membership, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(membership)
    assert threads.cgroup_cpus(tmp_path, tmp_path / "membership") == cpus
    assert threads.cgroup_cpus(tmp_path, tmp_path / "nothing") is None


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    cpu.available.cache_clear()
    yield
    cpu.available.cache_clear()


def test_without_numba_the_reference_runs_and_says_so_once(without_numba):
    packed = mx.quantize(mx.random.normal((16, 64)), group_size=64, bits=4)
    x = mx.random.normal((2, 64))
    with pytest.warns(RuntimeWarning, match=r"10 to 50 times slower.*install.*\[cpu\]") as warned:
        for _ in range(3):
            y = dequant_matvec(x, *packed, bits=4, group_size=64)
    expected = dequant_matvec_reference(x, *packed, bits=4, group_size=64)
    assert np.array_equal(np.array(y), np.array(expected))
    assert len(warned) == 1


def test_choosing_the_kernels_imports_no_numba():
    code = "import sys, flash_moe_mlx.models.moe_block, flash_moe_mlx.models.layers; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_read_only_package_is_cached_elsewhere(tmp_path: Path):
    """numba's own fall-back: a folder of the user's."""
    package = Path(cpu.__file__).parents[2]
    copy = tmp_path / "site" / package.name
    copy.parent.mkdir()
    ignore = ["--exclude=__pycache__", "-C", str(package.parent), package.name]
    tar = subprocess.run(["tar", "-cf", "-", *ignore], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-xf", "-", "-C", str(copy.parent)], input=tar, check=True)
    for folder in [copy, *copy.rglob("*")]:
        if folder.is_dir():
            folder.chmod(0o555)
    code = (
        "import mlx.core as mx; from flash_moe_mlx.ops.cpu.elementwise import swiglu; print(swiglu._cache.cache_path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, timeout=60
        )
    finally:
        for folder in [copy, *copy.rglob("*")]:
            if folder.is_dir():
                folder.chmod(0o755)
    if os.geteuid() != 0:  # root writes anyway
        assert done.stdout.startswith(str(tmp_path / "cache"))

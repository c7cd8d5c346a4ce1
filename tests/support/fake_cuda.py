"""A CUDA runtime on host memory: copies arrive late, on threads of their own; poison shows who looks too early."""

import ctypes
import mmap
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from flash_moe_mlx.errors import MemoryLimitError, StoreError

POISON = 0xA5


class FakeRuntime:
    """A CudaRuntime. Counts its calls; everything taken must have been given back by the end."""

    def __init__(self, delay: float = 0.001, pinned_limit: int = 1 << 40):
        self.delay, self.pinned_limit = delay, pinned_limit
        self.calls: Counter[str] = Counter()
        self.registered: dict[int, int] = {}
        self.pinned: dict[int, mmap.mmap] = {}
        self.on_device: list[tuple[int, int]] = []
        self.streams: dict[int, tuple[ThreadPoolExecutor, list[Future[None]]]] = {}
        self.copy_threads: set[int] = set()
        self.fail_copies = 0

    @property
    def held(self) -> tuple[int, int, int]:
        return len(self.registered), len(self.pinned), len(self.streams)

    def _pin(self, nbytes: int) -> None:
        if sum(self.registered.values()) + sum(map(len, self.pinned.values())) + nbytes > self.pinned_limit:
            raise MemoryLimitError("[cuda] must find memory, got cudaErrorMemoryAllocation. Lower memory_limit.")

    def register(self, address: int, nbytes: int) -> None:
        assert address % mmap.PAGESIZE == 0
        self._pin(nbytes)
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def allocate_pinned(self, nbytes: int) -> int:
        self._pin(nbytes)
        memory = mmap.mmap(-1, nbytes)
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        self.pinned[address] = memory
        return address

    def free_pinned(self, address: int) -> None:
        assert not any(future.running() for _, futures in self.streams.values() for future in futures)
        del self.pinned[address]

    def keep_on_device(self, address: int, nbytes: int) -> None:
        self.on_device.append((address, nbytes))

    def stream(self) -> int:
        number = len(self.streams)
        self.streams[number] = (ThreadPoolExecutor(1), [])
        return number

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.calls["copy"] += 1
        self.copy_threads.add(threading.get_ident())
        if self.fail_copies:
            self.fail_copies -= 1
            raise StoreError("[cuda] cudaMemcpyAsync must succeed, got cudaErrorInvalidValue.")
        ctypes.memset(target, POISON, nbytes)

        def move() -> None:
            time.sleep(self.delay)
            ctypes.memmove(target, source, nbytes)

        executor, futures = self.streams[stream]
        futures.append(executor.submit(move))

    def synchronize(self, stream: int) -> None:
        self.calls["synchronize"] += 1
        _, futures = self.streams[stream]
        while futures:
            futures[0].result()
            futures.pop(0)

    def close(self, stream: int) -> None:
        executor, futures = self.streams.pop(stream)
        assert not futures
        executor.shutdown()

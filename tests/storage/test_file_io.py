"""Positioned reads at every alignment, cut short in every way, against a plain slice of the file."""

import mmap
import os
import random
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from flash_moe_mlx.errors import StoreError
from flash_moe_mlx.storage.file_io import DIRECT_ALIGNMENT, ReadOnlyFile, read_aligned, read_fully

SIZE = 3 * DIRECT_ALIGNMENT + 1234
DATA = random.Random(0).randbytes(SIZE)

positions = st.integers(0, SIZE + 10) | st.sampled_from([0, 4095, 4096, 4097, 8192, 12288, SIZE - 1, SIZE])


class CutShort:
    """`os.preadv` that reads fewer bytes than asked (whole blocks of them), and is interrupted now and then."""

    def __init__(self, seed: int, preadv: Any, block: int):
        self.random = random.Random(seed)
        self.preadv = preadv
        self.block = block

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        choice = self.random.random()
        if choice < 0.2:
            raise InterruptedError
        most = len(buffer) if choice < 0.4 else self.block * self.random.randint(1, len(buffer) // self.block)
        return self.preadv(fd, [buffer[:most]], offset)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "data"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("aligned", [False, True])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=positions, nbytes=st.integers(1, 2 * DIRECT_ALIGNMENT), seed=st.integers(0, 2**32))
def test_reads_equal_a_slice(path: Path, aligned: bool, offset: int, nbytes: int, seed: int):
    expected = DATA[offset : offset + nbytes]
    target = memoryview(bytearray(b"\xee" * (nbytes + 2)))[1:-1]
    fd = os.open(path, os.O_RDONLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", CutShort(seed, os.preadv, DIRECT_ALIGNMENT if aligned else 1))
        if aligned:
            with mmap.mmap(-1, 4 * DIRECT_ALIGNMENT) as buffer:
                got = read_aligned(fd, buffer, target, offset)
        else:
            got = read_fully(fd, target, offset)
    os.close(fd)
    assert got == len(expected)
    assert bytes(target[:got]) == expected
    if aligned:
        assert bytes(target[got:]) == b"\xee" * (nbytes - got)
    assert target.obj[0] == target.obj[-1] == 0xEE


def test_aligned_reads_are_aligned(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Checks O_DIRECT's requirements without using it, since file systems differ in what they accept."""
    seen: list[tuple[int, int]] = []
    preadv = os.preadv

    def watch(fd: int, buffers: list[memoryview], offset: int) -> int:
        seen.append((offset, len(buffers[0])))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watch)
    fd = os.open(path, os.O_RDONLY)
    with mmap.mmap(-1, 4 * DIRECT_ALIGNMENT) as buffer:
        for offset, nbytes in [(1, 1), (4095, 2), (4096, 4096), (5000, 8000), (SIZE - 5, 5), (SIZE - 5, 50), (SIZE, 1)]:
            read_aligned(fd, buffer, memoryview(bytearray(nbytes)), offset)
    os.close(fd)
    assert len(seen) >= 7
    assert all(offset % DIRECT_ALIGNMENT == 0 and nbytes % DIRECT_ALIGNMENT == 0 for offset, nbytes in seen)


def test_copies_of_the_map(path: Path):
    file = ReadOnlyFile(path, direct=False)
    target = memoryview(bytearray(100))
    file.read_ahead(5000, 100)
    file.read_ahead(SIZE - 10, 500)  # past the end: nothing to ask for
    assert file.copy(target, 5000) == 100
    assert bytes(target) == DATA[5000:5100]
    assert file.copy(target, SIZE - 10) == 10
    assert bytes(target) == DATA[5000:5100]  # too few: none are copied
    assert file.copy(target, SIZE + 10) == 0
    file.close()
    file.close()


def test_files_that_cannot_be_opened_or_mapped(tmp_path: Path):
    with pytest.raises(StoreError, match=r"must be readable, got .*No such file"):
        ReadOnlyFile(tmp_path / "nothing", direct=False)
    with pytest.raises(StoreError, match=r"must be readable, got .*Is a directory"):
        ReadOnlyFile(tmp_path, direct=False)
    (tmp_path / "empty").write_bytes(b"")
    file = ReadOnlyFile(tmp_path / "empty", direct=False)
    with pytest.raises(StoreError, match=r'must be mappable, got .*empty file.* Use io="pread"'):
        file.map()
    file.close()

"""The CUDA form of every kernel compiles: checked with nvcc where there is one, no GPU needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flash_moe_mlx.ops import kernel_source

from .calls import CALLS, record
from .cuda_source import cuda_source


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("name", CALLS)
def test_compiles(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "kernel.cu").write_text(cuda_source(*record(monkeypatch, name)[:3]))
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-o", "kernel.cubin", "kernel.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Arrays indexed by anything but constants would live in local memory: the unrolling is part of the speed.
    assert "0 bytes stack frame, 0 bytes spill stores" in done.stderr


@pytest.mark.parametrize("name", CALLS)
def test_no_address_space_is_left(name: str):
    header, body = kernel_source.generate(name, "cuda")
    text = header.split("namespace metal", 1)[1] + body
    assert not re.search(r"\b(device|constant|threadgroup|thread)\b", text)
    assert "threadgroup_barrier" in text


def test_only_whole_words_go():
    text = "const threadgroup float* a = (const threadgroup float*)b; threadgroup_barrier(x); thread uint (&w)[4];"
    assert kernel_source.to_cuda(text) == "const float* a = (const float*)b; threadgroup_barrier(x); uint (&w)[4];"

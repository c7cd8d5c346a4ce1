"""The CUDA form of every kernel compiles: checked with nvcc where there is one, no GPU needed."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe_mlx.ops.gpu import kernel_source

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


def test_cuda_gets_its_text_from_files(tmp_path: Path):
    line = kernel_source.include("int a;\n", tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    assert (line, path.read_text()) == (f'#include "{path}"\n', "int a;\n")
    path.write_text("cut sho")  # whoever wrote it, it is not this text
    assert kernel_source.include("int a;\n", tmp_path / "new") == line
    assert path.read_text() == "int a;\n"
    assert kernel_source.include("int b;\n", tmp_path / "new") != line
    (tmp_path / "file").touch()
    assert kernel_source.include("int a;\n", tmp_path / "file" / "below") == "int a;\n"


@pytest.mark.parametrize("name", CALLS)
def test_what_mlx_gets_for_cuda_is_short_and_names_the_shapes(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    kernel = record(monkeypatch, name)[0]
    monkeypatch.setattr(kernel_source, "cuda_folder", lambda: tmp_path)
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **arguments: arguments)
    made = replace(kernel).cuda
    assert len(made["header"] + made["source"]) < 1000
    _, body = kernel_source.generate(kernel.name, "cuda")
    for argument in kernel_source.read_kernel(kernel.name).inputs:
        assert (f"{argument}_shape" in made["source"]) == (f"{argument}_shape" in body)

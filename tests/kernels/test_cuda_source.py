"""The CUDA form of every kernel compiles, with NVIDIA's compiler, which needs no GPU."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe_mlx.ops.gpu import cuda_modules, kernel_source
from flash_moe_mlx.ops.gpu.cuda_modules import MLX_HEADERS, Modules, module_name
from flash_moe_mlx.ops.gpu.nvrtc import NvrtcCompiler

from .calls import CALLS, record


@pytest.fixture(scope="module")
def compiler() -> NvrtcCompiler:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC, which is for Linux on x86-64 alone here")
    return NvrtcCompiler("sm_90a", ["--ptxas-options=-v"])


@pytest.mark.parametrize("name", CALLS)
def test_compiles(name: str, compiler: NvrtcCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    kernel, inputs, outputs, _ = record(monkeypatch, name)
    monkeypatch.setattr(kernel_source, "cuda_folder", lambda: tmp_path / "sources")
    text = replace(kernel).mlx_text(inputs, outputs)
    modules = Modules(tmp_path / "modules", compiler)
    modules.provide(kernel.label, text)
    modules.provide(kernel.label, text)
    assert modules.compiled == 1
    stem = module_name(kernel.label, MLX_HEADERS + text)
    function, mangled = (tmp_path / "modules" / f"{stem}.txt").read_text().rstrip("\n").split("\t")
    assert function == f"mlx::core::cu::custom_kernel_{kernel.label}"
    binary = (tmp_path / "modules" / f"{stem}.ptx").read_bytes()
    assert binary.startswith(b"\x7fELF")
    assert mangled.encode() in binary
    # Arrays indexed by anything but constants would live in local memory: the unrolling is part of the speed.
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in compiler.log


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


class _Compiler:
    """Compiles nothing: the binary is the text."""

    architecture = "sm_1"

    def __init__(self, failure: Exception | None = None):
        self.failure, self.texts = failure, list[str]()

    def compile(self, text: str) -> tuple[bytes, str]:
        self.texts.append(text)
        if self.failure is not None:
            raise self.failure
        return text.encode(), "_Zname"


ARGUMENTS = [("x", mx.bfloat16, False), ("bank", mx.uint32, True)], [("y", mx.float32, False)]


def test_the_text_is_the_one_that_mlx_compiles():
    # Printed by mlx.core.fast.cuda_kernel(..., verbose=True) of MLX 0.32.4, without the first five lines.
    assert cuda_modules.mlx_text("f", "int a;\n", "// bank_shape\nbody", *ARGUMENTS) == (
        "int a;\nnamespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
        "__global__ void custom_kernel_f(\n    const __nv_bfloat16* x,\n    const uint32_t* bank,\n"
        "    const __grid_constant__ Shape bank_shape,\n    float* y) {\n// bank_shape\nbody\n}\n\n"
        "} // namespace mlx::core::cu\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="libstdc++'s hash, and so the names of MLX's modules on Linux")
def test_the_name_has_the_hash_of_libstdcpp():
    # Printed by a program of std::hash<std::string>, compiled with g++.
    assert module_name("f", "abc") == "custom_kernel_f_32d82bf8ed3dba39"
    assert module_name("f", "x" * 1001) == "custom_kernel_f_d39ccc5cadc45ebf"


def test_what_is_stored_is_not_compiled_again(tmp_path: Path):
    text, compiler = cuda_modules.mlx_text("f", "", "body", *ARGUMENTS), _Compiler()
    for _ in range(2):  # two processes
        Modules(tmp_path, compiler).provide("f", text)
    assert len(compiler.texts) == 1
    assert "mlx/backend" not in compiler.texts[0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".ptx", ".txt"}
    Modules(tmp_path, compiler).provide("f", text.replace("body", "other"))
    assert len(list(tmp_path.iterdir())) == 4


def test_it_is_said_how_many_kernels_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    modules = Modules(tmp_path, _Compiler())
    for label in ("flash_moe_a_1", "flash_moe_b_2", "of_someone_else"):
        modules.provide(label, "text")
    monkeypatch.setattr(cuda_modules, "modules", lambda: modules)
    assert cuda_modules.explain_compilation().startswith(f"2 kernels stored in {tmp_path}; ")


@pytest.mark.parametrize("failure", [RuntimeError("NVRTC refuses f"), OSError("disk full")])
def test_mlx_compiles_what_cannot_be_compiled_or_stored(failure: Exception, tmp_path: Path):
    modules = Modules(tmp_path, compiler := _Compiler(failure))
    for _ in range(2):
        modules.provide("f", "text")
    assert (len(compiler.texts), modules.compiled, list(tmp_path.iterdir())) == (1, 0, [])


def test_there_are_no_modules_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    def refused() -> _Compiler:
        raise RuntimeError("cudaDeviceGetAttribute must succeed, got cudaErrorInsufficientDriver")

    monkeypatch.setattr(cuda_modules, "is_available", lambda: True)
    monkeypatch.setattr(cuda_modules, "NvrtcCompiler", refused)
    cuda_modules.modules.cache_clear()
    try:
        assert cuda_modules.modules() is None
        assert "every process compiles" in cuda_modules.explain_compilation()
    finally:
        cuda_modules.modules.cache_clear()

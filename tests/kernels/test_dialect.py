"""The kernel files keep to their dialect, and the lint that says so can fail."""

from pathlib import Path

import pytest

from flash_moe_mlx.errors import FlashMoEError
from flash_moe_mlx.ops.gpu import kernel_source

from .calls import CALLS
from .lint import lint_body, lint_code, lint_file

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
HELPERS = ("quantized.h", "expert.h", "delta.h")


def test_every_kernel_file_is_known():
    assert {path.stem for path in KERNELS.glob("*.metal")} == set(CALLS)
    assert {path.name for path in KERNELS.glob("*.h")} == {*HELPERS, *kernel_source.DIALECTS.values()}


@pytest.mark.parametrize("name", CALLS)
def test_kernel_file_keeps_to_the_dialect(name: str):
    text = (KERNELS / f"{name}.metal").read_text(encoding="utf-8")
    assert lint_file(name, text, kernel_source.read_kernel(name).inputs) == []


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_keep_to_the_dialect(name: str):
    text = (KERNELS / name).read_text(encoding="ascii")
    assert lint_code(kernel_source.strip_comments(text)) == []


@pytest.mark.parametrize(
    "code",
    [
        "double a = 1.0f;", "goto end;", "float a = 1.0;", "float a = 0.5 * b;", "uint4 a = uint4(1, 2, 3, 4);",
        "float a = as_type<float>(b);", "float* p = x;", "const float* p = x;", "float a = exp(b);",
        "const device float* p = (const float*)x;", "thread float a; float (&r)[4] = b;", "if (lane > 3) { return; }",
        "const uint i = threadIdx.x;", "X* p = x;", "const UP_S* p = q;", "uint a = threads_per_simdgroup;",
        "uint my_x_shape = 3;", "uint a = __popc(b);",
    ],
)  # fmt: skip
def test_lint_finds(code: str):
    assert lint_body(code, ("x",)) != []


@pytest.mark.parametrize(
    "code",
    [
        "const device float4* p = (const device float4*)x;", "float a = 1.0f * b[2] + 1e-6f;", "metal::exp(b)",
        "thread float (&w)[8]", "const thread FmRows<A, B, S>& rows", "n = x_shape[1];", "a = K * b; c = M * d",
        "metal::fma(a, b, c)", "float4 s; s.x = 0.0f;",
    ],
)  # fmt: skip
def test_lint_lets_pass(code: str):
    assert lint_body(code, ("x",)) == []


def test_lint_finds_what_is_missing_in_a_file():
    text = (KERNELS / "moe_combine.metal").read_text(encoding="ascii")
    inputs = kernel_source.read_kernel("moe_combine").inputs
    assert lint_file("moe_combine", text.replace("// Traffic", "// Trafic"), inputs) == ["no Traffic line"]
    assert "not ASCII" in lint_file("moe_combine", text.replace("weighted", "wéighted"), inputs)[0]
    assert lint_file("moe_combine", text.replace(kernel_source.BODY_MARKER, ""), inputs)[0].startswith("no line")
    assert "longer" in lint_file("moe_combine", "//" + " " * 130 + "\n" + text, inputs)[0]


def test_a_file_without_its_marker_is_refused(monkeypatch: pytest.MonkeyPatch):
    kernel_source.read_kernel.cache_clear()
    monkeypatch.setattr(kernel_source, "read_text", lambda name: "// Inputs   x\n// Outputs  y\nbody")
    with pytest.raises(FlashMoEError, match="must have the line"):
        kernel_source.read_kernel("moe_combine")
    monkeypatch.undo()
    assert kernel_source.read_kernel("moe_combine").outputs == ("out",)


def test_kernels_come_from_the_package_or_the_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The wheel holds kernels/ inside the package; a source tree holds it at its top."""
    assert kernel_source.kernel_folder() == KERNELS or "site-packages" in str(kernel_source.kernel_folder())
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "dialect_metal.h").write_text("")
    monkeypatch.setattr(kernel_source.resources, "files", lambda package: tmp_path)
    assert kernel_source.kernel_folder() == tmp_path / "kernels"


def test_missing_kernels_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(kernel_source.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(kernel_source, "__file__", str(tmp_path / "a" / "b" / "c" / "d.py"))
    with pytest.raises(FlashMoEError, match="Reinstall"):
        kernel_source.kernel_folder()

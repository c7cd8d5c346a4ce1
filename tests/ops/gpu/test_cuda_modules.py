"""MLX loads the kernels that were compiled for it: on a CUDA GPU."""

import mlx.core as mx
import pytest

from flash_moe_mlx.ops.backend import backend
from flash_moe_mlx.ops.gpu import cuda_modules
from flash_moe_mlx.ops.gpu.nvrtc import NvrtcCompiler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(backend() != "cuda", reason="needs a CUDA GPU")]

ARGUMENTS = [("x", mx.float32, True)], [("y", mx.float32, False)]
BODY = "y[threadIdx.x] = x_shape[0] + {};"
"""Its constant tells which of two texts was compiled."""


def _launch(label: str, body: str, *, verbose: bool = False) -> list[float]:
    kernel = mx.fast.cuda_kernel(name=label, input_names=["x"], output_names=["y"], source=body, header="int a;\n")
    (y,) = kernel(
        inputs=[mx.zeros((8,))], grid=(2, 1, 1), threadgroup=(2, 1, 1), output_shapes=[(2,)],
        output_dtypes=[mx.float32], stream=mx.gpu, verbose=verbose,
    )  # fmt: skip
    return y.tolist()


def test_mlx_compiles_the_text_that_is_expected(capfd: pytest.CaptureFixture[str]):
    assert _launch("printed", BODY.format(1), verbose=True) == [9.0, 9.0]
    text = cuda_modules.MLX_HEADERS + cuda_modules.mlx_text("printed", "int a;\n", BODY.format(1), *ARGUMENTS)
    assert f"```\n{text}\n```\n" in capfd.readouterr().out


def test_mlx_loads_what_is_stored():
    expected = cuda_modules.mlx_text("stored", "int a;\n", BODY.format(1), *ARGUMENTS)
    other = cuda_modules.own_text(expected.replace("+ 1", "+ 2"))
    binary, mangled = NvrtcCompiler().compile(other)
    stem = cuda_modules.modules_folder() / cuda_modules.module_name("stored", cuda_modules.MLX_HEADERS + expected)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".txt").write_text(f"mlx::core::cu::custom_kernel_stored\t{mangled}\n")
    stem.with_suffix(".ptx").write_bytes(binary)
    try:
        assert _launch("stored", BODY.format(1)) == [10.0, 10.0]
    finally:
        stem.with_suffix(".txt").unlink()
        stem.with_suffix(".ptx").unlink()

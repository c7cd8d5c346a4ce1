"""The complete Metal source that MLX generates, taken without a GPU: compared with a snapshot, its signature checked.

To renew a snapshot after a change that is meant: delete the file and run the test, which writes it and fails once.
"""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe_mlx.ops.gpu import kernel_source

from .calls import CALLS, record
from .opencl import MAX_CONSTANT_ELEMENTS

SNAPSHOTS = Path(__file__).resolve().parent / "snapshots"
METAL_TYPES = {
    mx.float32: "float", mx.bfloat16: "bfloat16_t", mx.float16: "float16_t", mx.uint32: "uint32_t", mx.bool_: "bool",
}  # fmt: skip
ARGUMENT = re.compile(r"^  (const )?(device|constant) (\w+)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]", re.MULTILINE)


def exported(launch: tuple) -> tuple[str, tuple[int, ...]]:
    """(source, grid + threadgroup) of a launch, from MLX's own export of the graph."""
    kernel, inputs, outputs, grid = launch

    def call(*arrays: mx.array) -> list[mx.array]:
        return kernel.metal(
            inputs=list(arrays), grid=grid, threadgroup=kernel.threadgroup, stream=mx.gpu,
            output_shapes=[shape for shape, _ in outputs], output_dtypes=[dtype for _, dtype in outputs],
        )  # fmt: skip

    events: list[dict] = []
    mx.export_function(events.append, call, *inputs)
    (primitive,) = (event for event in events if event["type"] == "primitive")
    return primitive["arguments"][1], tuple(primitive["arguments"][2:8])


@pytest.mark.parametrize("name", CALLS)
def test_source_is_the_snapshot(name: str, monkeypatch: pytest.MonkeyPatch):
    source, _ = exported(record(monkeypatch, name))
    snapshot = SNAPSHOTS / f"{name}.metal"
    if not snapshot.exists():
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(source)
        pytest.fail(f"{snapshot.name} was missing and is now written: look at it, and commit it")
    assert source == snapshot.read_text()


@pytest.mark.parametrize("name", CALLS)
def test_signature_is_the_wrappers(name: str, monkeypatch: pytest.MonkeyPatch):
    """Names, dtypes, address spaces and constness of the arguments, in the order in which they are bound."""
    launch = record(monkeypatch, name)
    made, inputs, outputs, grid = launch
    source, launched = exported(launch)
    kernel = kernel_source.read_kernel(name)
    found = [match.groups() for match in ARGUMENT.finditer(source)]
    expected = []
    for argument, array in zip(kernel.inputs, inputs, strict=True):
        space = "constant" if array.size < MAX_CONSTANT_ELEMENTS else "device"
        expected.append(("const ", space, METAL_TYPES[array.dtype], "*", argument))
        if f"{argument}_shape" in kernel.body:
            expected.append(("const ", "constant", "int", "*", f"{argument}_shape"))
    for argument, (_, dtype) in zip(kernel.outputs, outputs, strict=True):
        expected.append((None, "device", METAL_TYPES[dtype], "*", argument))
    assert [argument[:5] for argument in found] == expected
    assert [int(argument[5]) for argument in found] == list(range(len(expected)))
    assert launched == (*grid, *made.threadgroup)
    assert f"[[kernel]] void custom_kernel_{made.label}" in source
    assert kernel_source.declare(made.constants) + kernel.body in source


@pytest.mark.parametrize("name", CALLS)
def test_launch_is_whole_threadgroups(name: str, monkeypatch: pytest.MonkeyPatch):
    """Bodies have barriers and SIMD operations: no threadgroup may be cut, and its rows are whole SIMD groups."""
    kernel, *_, grid = record(monkeypatch, name)
    threadgroup = kernel.threadgroup
    assert all(size % block == 0 for size, block in zip(grid, threadgroup, strict=True))
    assert threadgroup[0] % 32 == 0
    assert threadgroup[0] * threadgroup[1] * threadgroup[2] <= 1024


def test_threadgroup_memory_fits_every_apple_gpu():
    """32 KiB is Metal's limit for a threadgroup; the widest supported heads and rows stay below it."""
    from flash_moe_mlx.ops.gated_delta import LANES, MAX_STEPS, PROMPT_SPREAD, STEP_SPREAD
    from flash_moe_mlx.ops.gated_delta import STAGED_VALUES as DELTA_VALUES
    from flash_moe_mlx.ops.gpu.geometry import CHUNK, STAGED_VALUES, choose_geometry

    for columns in (64, 2048, 4096, 8192, 32768):
        for bits in (2, 3, 4, 8):
            for x_rows in (1, 2, 3, 4):
                made = choose_geometry("test", columns, [(bits, 64)], rows=2, simd_groups=8, x_rows=x_rows)
                assert x_rows * made.tile // CHUNK * (CHUNK + 4) * 4 <= 32768
    assert STAGED_VALUES <= 4096
    for k_dim in (32, 64, 128, 192, 256):
        steps = min(MAX_STEPS, DELTA_VALUES // k_dim)
        lanes = max(lanes for lanes in (LANES, LANES // 2) if k_dim % (4 * lanes) == 0)
        for rows, simd_groups in (STEP_SPREAD, PROMPT_SPREAD):
            assert steps * (2 * k_dim + simd_groups * 32 // lanes * rows + 3) * 4 <= 32768

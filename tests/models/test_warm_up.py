"""Kernels compiled at load: what an answer launches later has been launched on another thread by then."""

import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flash_moe_mlx import FlashMoEError, load_model
from flash_moe_mlx.formats.checkpoint import Checkpoint
from flash_moe_mlx.models import gpu_token, warm_up
from flash_moe_mlx.ops.gpu import kernel_source
from flash_moe_mlx.runtime import loading

from ..kernels import opencl
from ..support.models import make_converted, streamed
from ..support.switch_configs import make_config
from ..support.switch_models import write_model
from .test_gpu_step import router_in_eight_bits

pytestmark = pytest.mark.skipif(opencl.opencl() is None, reason="needs the OpenCL CPU runtime of the dev extra")

PROMPT = list(range(3, 15))
METAL = "[metal::Device] Unable to build metal library from source\nprogram_source:12:3: error: unknown type name"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("gpu"), bits=4, predicate=router_in_eight_bits)


class Compiler:
    """Stands in for Metal's compiler and GPU. Notes each kernel's label and the thread that launched it first."""

    def __init__(self) -> None:
        self.compiled: dict[str, str] = {}
        self.refused = ""

    def of(self, kernel: kernel_source.Kernel) -> Any:
        def run(*, inputs: Any, grid: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            if kernel.name == self.refused:
                raise RuntimeError(METAL)
            self.compiled.setdefault(kernel.label, threading.current_thread().name)
            return opencl.launch(kernel, inputs, list(zip(output_shapes, output_dtypes, strict=True)), grid)

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    # With a setter that keeps nothing: kernels are cached, and would remember another test's compiler.
    monkeypatch.setattr(kernel_source.Kernel, "run", property(compiler.of, lambda kernel, run: None))
    monkeypatch.setattr(gpu_token, "compile_layers", lambda function: function)  # OpenCL computes as it is called
    monkeypatch.setattr(import_module("flash_moe_mlx.ops.backend"), "backend", lambda: "metal")
    return compiler


def test_an_answer_compiles_nothing(checkpoint: Path, compiler: Compiler):
    with streamed(checkpoint) as model:
        at_load = dict(compiler.compiled)
        assert {thread.rpartition("_")[0] for thread in at_load.values()} == {"flash-moe-compile"}
        cache = model.make_cache()
        mx.eval(model(mx.array([PROMPT]), cache=cache, logits_to_keep=1))
        for token in (7, 9):
            mx.eval(model(mx.array([[token]]), cache=cache))
        for layer in range(len(model.layers)):  # and with all experts in slots, where the host sees no ids
            model.streaming.debug_state().cache.acquire(layer, list(range(model.config.num_experts))).wait()
        mx.eval(model(mx.array([[11]]), cache=cache))
        assert model.runs_ahead
    assert {label: thread for label, thread in compiler.compiled.items() if label not in at_load} == {}
    names = {label.removeprefix("flash_moe_").rpartition("_")[0] for label in at_load}
    assert names >= {
        "norm_matvec",
        "router_topk",
        "expert_gate_up",
        "expert_down_combine",
        "gated_delta",
        "qk_norm_rope",
    }


def test_the_weights_are_read_meanwhile(checkpoint: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    """The compiler waits for the last of them: it would for ever if reading began after it."""
    last, run = threading.Event(), warm_up.KernelWarmUp.run
    load_weights = loading._Prepared._load_weights

    def wait(self: warm_up.KernelWarmUp) -> None:
        assert self.others and last.wait(60)
        run(self)

    def load(self: Any, names: Any) -> None:
        load_weights(self, names)
        if not self.spec.weights:
            last.set()

    monkeypatch.setattr(warm_up.KernelWarmUp, "run", wait)
    monkeypatch.setattr(loading._Prepared, "_load_weights", load)
    with streamed(checkpoint):
        assert compiler.compiled


@pytest.mark.parametrize("kernel", ["router_topk", "gated_delta", "expert_down_combine"])
def test_a_refusal_names_the_kernel_and_the_switch(kernel: str, checkpoint: Path, compiler: Compiler):
    compiler.refused = kernel
    with pytest.raises(
        FlashMoEError, match=rf"\[kernels\] the kernel {kernel} must compile[^$]*program_source:12:3"
    ) as error:
        load_model(checkpoint, memory_limit="1GB")
    assert "FLASH_MOE_REFERENCE=1" in str(error.value)


def test_a_model_of_mlx_lms_has_its_experts_compiled(tmp_path: Path, compiler: Compiler):
    with streamed(write_model(tmp_path, make_config("qwen3_moe"), "4-bit g64"), max_context=128) as model:
        at_load = set(compiler.compiled)
        assert at_load
        mx.eval(model(mx.array([[3]])))
    assert set(compiler.compiled) == at_load


def test_layers_alike_are_one_kind(checkpoint: Path):
    opened = Checkpoint.open(checkpoint)
    layouts = {layer: opened.layout(layer) for layer in opened.moe_layers}
    a, b = mx.zeros((2, 2)), mx.zeros((2, 3))
    weights = {f"model.layers.{layer}.w": a if layer != 2 else b for layer in range(4)} | {"lm_head.weight": a}
    assert warm_up.layers_by_kind(weights, layouts) == [0, 2]
    del layouts[3]
    assert warm_up.layers_by_kind(weights, layouts) == [0, 2, 3]


def test_nothing_is_compiled_on_a_cpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warm_up.KernelWarmUp, "run", lambda _: pytest.fail("started"))
    with streamed(checkpoint):
        pass

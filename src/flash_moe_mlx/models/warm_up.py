"""Compilation of a model's GPU kernels in the background while its weights are read, so that no answer waits for it.

MLX compiles a kernel when it is first launched, and holds a lock meanwhile, on Metal as on CUDA: two threads compile no
faster than one. So a single thread launches each kernel of decode once, on zeros, as soon as one layer of each kind has
been read; most of the weights are read while it works.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..formats.expert_layout import RecordLayout
from ..ops.dequant_matvec import MAX_ROWS
from ..ops.expert_ffn import expert_ffn
from ..ops.gpu.kernel_source import launched_at_once
from ..ops.moe_combine import moe_combine
from ..ops.slot_memory import ExpertRecords
from .gpu_step import moe_step, norm_of, prepare

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")


def layers_by_kind(weights: Mapping[str, mx.array], layouts: Mapping[int, RecordLayout]) -> list[int]:
    """Return the first layer of each kind: others with the same weights and experts launch the same kernels.

    Args:
        weights: Dense weights by parameter name; their shapes and dtypes count.
        layouts: Layout of the experts of each layer that has any.
    """
    found: dict[int, list[object]] = {}
    for name, value in weights.items():
        if match := _LAYER.search(name):
            found.setdefault(int(match[1]), []).append((match[2], value.shape, value.dtype))
    kinds: dict[object, int] = {}
    for layer in sorted(found):
        layout = layouts.get(layer)
        experts = None if layout is None else _format(layout)
        kinds.setdefault((frozenset(found[layer]), experts), layer)
    return sorted(kinds.values())


@contextmanager
def compiling(work: Callable[[], None]) -> Iterator[None]:
    """Run ``work`` on a thread of its own within the context, and wait for it at the end.

    Raises:
        FlashMoEError: If a kernel doesn't compile; names the kernel, and the switch that runs without kernels.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="flash-moe-compile") as pool:
        future = pool.submit(work)
        yield
        future.result()


class KernelWarmUp:
    """The kernels to compile for a model, and the weights that this needs.

    Attributes:
        first: Names of the weights to load before `run`: those outside the layers, and one layer of each kind.
        others: Names of the other weights.
    """

    def __init__(self, model: Any, weights: Mapping[str, mx.array], layouts: Mapping[int, RecordLayout], k: int):
        """Find one layer of each kind.

        Args:
            model: The model, without weights.
            weights: Its dense weights by parameter name, lazy.
            layouts: Layout of the experts of each layer that has any.
            k: Number of experts per token.
        """
        self._model, self._layouts, self._k = model, layouts, k
        self._dtype = next((value.dtype for name, value in weights.items() if name.endswith("norm.weight")), mx.float32)
        self._layers = layers_by_kind(weights, layouts)
        layers = {name: _layer_of(name) for name in weights}
        self.first = [name for name, layer in layers.items() if layer is None or layer in self._layers]
        self.others = [name for name, layer in layers.items() if not (layer is None or layer in self._layers)]

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules of the layers that `run` computes with."""
        if hasattr(self._model, "prepare_steps"):
            for layer in self._layers:
                yield from self._model.layers[layer].modules()

    def run(self) -> None:
        """Compile kernel after kernel. Call where `use_kernels`, once the first weights are loaded.

        Raises:
            FlashMoEError: If a kernel doesn't compile; names the kernel, and the switch that runs without kernels.
        """
        with launched_at_once():
            if not hasattr(self._model, "prepare_steps"):
                self._compile_experts()
                return
            for layer in self._layers:
                self._compile_layer(self._model.layers[layer], self._layouts.get(layer))
            norm = self._model.text_model.norm
            mx.eval(self._model.output_projection(norm(mx.zeros((1, 1, norm.weight.shape[0]), self._dtype))))

    def _compile_experts(self) -> None:
        """Compile the kernels of a model of mlx-lm's, where all but the experts is MLX's own."""
        own = self._model.layers_of_plain_swiglu()
        layouts = [layout for layer, layout in self._layouts.items() if layer in own]
        for layout in {_format(layout): layout for layout in layouts}.values():
            x = mx.zeros((1, layout.hidden_size), self._dtype)
            mx.eval(expert_ffn(x, _empty(layout), _first_slots(self._k)))

    def _compile_layer(self, layer: Any, layout: RecordLayout | None) -> None:
        """Compile what a layer launches for a prompt, and for one token, with its experts in slots or not."""
        prepare([layer])
        hidden = layer.input_layernorm.weight.shape[0]
        mx.eval(layer.mix(mx.zeros((1, MAX_ROWS + 1, hidden), self._dtype), layer.mixer.make_cache()))
        rows = layer.mix(mx.zeros((1, 1, hidden), self._dtype), layer.mixer.make_cache()).reshape(1, hidden)
        step = None if layout is None or "shared_expert" not in layer.mlp else moe_step(layer.mlp)
        if step is None or layout is None:
            return
        norm = norm_of(layer.post_attention_layernorm)
        for table in (None, mx.zeros((layer.mlp.gate.weight.shape[0],), mx.uint32)):
            _, weights, _, logits = step.route(rows, norm, table)
        mx.eval(step.finish(rows, norm, _empty(layout), _first_slots(self._k), weights, logits))
        outputs = mx.zeros((1, self._k, hidden))
        mx.eval(moe_combine(outputs, weights, rows, logits[:, -1:], rows))  # after a prompt's groups of experts


def _layer_of(name: str) -> int | None:
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def _format(layout: RecordLayout) -> object:
    return layout.parts, layout.quantizations, layout.record_bytes


def _empty(layout: RecordLayout) -> ExpertRecords:
    record = mx.zeros((1, layout.record_bytes // mx.uint32.size), mx.uint32)
    mx.eval(record)
    return ExpertRecords(layout, record)


def _first_slots(k: int) -> mx.array:
    return mx.zeros((1, k), mx.uint32)

"""The number of launches per token and layer on a GPU, ours and MLX's, counted in the graph that MLX exports."""

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flash_moe_mlx.models import gpu_token
from flash_moe_mlx.models.caches import ArraysCache, KVCache
from flash_moe_mlx.ops.gpu import kernel_source
from flash_moe_mlx.runtime import loading

from ..support.models import make_converted, streamed
from .test_gpu_step import router_in_eight_bits

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "NumberOfElements", "Reshape",
    "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
"""Primitives that only look at their input in another way."""

ATTENTION = "ErfInv"
"""Stands in for MLX's attention, one launch, which a build without a GPU exports as the many of its fallback."""

MOST = {"linear_attention": {"CustomKernel": 7}, "full_attention": {"CustomKernel": 7, "SliceUpdate": 2, ATTENTION: 1}}
"""Launches by layer type. They must not grow: each costs the host as much as a small layer's experts cost the GPU."""


def launches(function: Callable[..., Any], *arrays: mx.array) -> Counter[str]:
    """Primitives that a GPU would run for a function of arrays."""
    events: list[dict[str, Any]] = []
    mx.export_function(events.append, function, *arrays)
    return Counter(event["name"] for event in events if event["type"] == "primitive" and event["name"] not in VIEWS)


@pytest.fixture
def graphs_for_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels enter the graph as Metal's, and nothing is run."""

    def launch(kernel: Any, inputs: Any, outputs: Any, grid: Any) -> list[mx.array]:
        return kernel.metal(
            inputs=list(inputs), grid=grid, threadgroup=kernel.threadgroup, stream=mx.gpu,
            output_shapes=[shape for shape, _ in outputs], output_dtypes=[dtype for _, dtype in outputs],
        )  # fmt: skip

    monkeypatch.setattr(kernel_source, "launch", launch)
    monkeypatch.setattr(import_module("flash_moe_mlx.ops.backend"), "backend", lambda: "metal")
    monkeypatch.setattr(loading, "use_kernels", lambda: False)  # nothing is compiled at load
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda queries, keys, values, **_: mx.erfinv(queries))


def state_of(model: Any, kind: str) -> list[mx.array]:
    """A cache's arrays after some tokens."""
    c = model.config
    if kind == "linear_attention":
        heads = (c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim)
        window = mx.zeros((1, c.linear_conv_kernel_dim - 1, c.linear_conv_dim), model.dtype)
        return [window, mx.zeros((1, *heads))]
    return [mx.zeros((1, c.num_key_value_heads, 256, c.head_dim), model.dtype) for _ in range(2)]


def cache_of(kind: str, state: list[mx.array]) -> Any:
    if kind == "linear_attention":
        cache = ArraysCache(size=2)
        cache[0], cache[1] = state
        return cache
    cache = KVCache()
    cache.keys, cache.values = state
    cache.offset = 100
    return cache


@pytest.mark.usefixtures("graphs_for_metal")
@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bf16", "f16"])
def test_a_layer_is_few_launches(kind: str, dtype: mx.Dtype, tmp_path: Path):
    checkpoint = make_converted(tmp_path, bits=4, predicate=router_in_eight_bits)
    with streamed(checkpoint) as model:
        model.set_dtype(dtype)
        mx.eval(model.parameters())
        index = model.config.layer_types.index(kind)
        layer, bank = model.layers[index], model.streaming.debug_state().cache.bank(index)

        def token(x: mx.array, table: mx.array, *state: mx.array) -> list[mx.array]:
            cache = cache_of(kind, list(state))
            part = gpu_token.LayerToken.of(layer)
            assert part is not None
            y, ids = part.finish(part.mix(x, cache), bank, table)
            after = (cache[0], cache[1]) if kind == "linear_attention" else (cache.keys, cache.values)
            return [y, ids, *after]

        x = mx.zeros((1, 1, model.config.hidden_size), dtype)
        table = mx.arange(model.config.num_experts).astype(mx.uint32)
        assert launches(token, x, table, *state_of(model, kind)) == MOST[kind]


def test_launches_are_counted_and_views_are_not():
    counted = launches(lambda x: [mx.exp(x[:, 1:]).T.reshape(-1) + 1, mx.fast.rms_norm(x, None, 1e-6)], mx.ones((2, 3)))
    assert counted["Exp"] == counted["Add"] - 1 == 1  # and what the norm's fallback takes

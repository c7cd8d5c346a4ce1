"""GatedDeltaNet: linear attention by the gated delta rule, with a convolution window and a recurrent state."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_ssm_mask

from ...ops.gated_delta import conv1d_silu, gated_delta
from ...ops.rms_norm_gated import rms_norm_gated
from ..caches import ArraysCache
from ..config import ModelConfig
from ..layers import Linear, QuantizationOf
from .blocks import FLOAT32_BYTES, TokenMixer, mixer_block, other_cache

if TYPE_CHECKING:
    from ...ops.cpu.program import Operation
    from ...ops.cpu.vectors import Pool, Vector


class RMSNormGated(nn.Module):
    """``rms_norm(x) * silu(gate)``, with product and SiLU in float32."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones(dims)
        self.eps = eps

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return rms_norm_gated(x, gate, self.weight, self.eps)


class DepthwiseConv(nn.Module):
    """Holder of the weight of a causal depthwise convolution, shape (channels, kernel, 1)."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, 1))


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule, behind a short causal convolution.

    Subclasses define how the projections are stored. Reference: Yang et al. 2024, arXiv:2412.06464.
    """

    weight_name = "linear_attn"

    def __init__(self, config: ModelConfig, path: str, quantization_of: QuantizationOf):
        super().__init__()
        self.config = config
        self.conv1d = DepthwiseConv(config.linear_conv_dim, config.linear_conv_kernel_dim)
        self.dt_bias = mx.ones(config.linear_num_value_heads)
        self.A_log = mx.zeros(config.linear_num_value_heads)
        self.norm = RMSNormGated(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = Linear(config.linear_value_dim, config.hidden_size, quantization_of(f"{path}.out_proj"))

    def projections(self) -> tuple[Linear, ...]:
        """Return the stored projections, to be applied to (B, L, H)."""
        raise NotImplementedError

    def split(self, *projected: mx.array) -> tuple[mx.array, ...]:
        """Split the projections' results into qkv (B, L, C), z (B, L, Hv * Dv), b and a (B, L, Hv)."""
        raise NotImplementedError

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """Map (B, L, H) to (B, L, H) and advance the cache by L."""
        config, (batch, length, _) = self.config, x.shape
        mask = create_ssm_mask(x, cache)
        qkv, z, b, a = self.split(*(projection(x) for projection in self.projections()))
        window = cache[0]
        if window is None:
            window = mx.zeros((batch, config.linear_conv_kernel_dim - 1, config.linear_conv_dim), qkv.dtype)
        qkv, cache[0] = conv1d_silu(qkv, window, self.conv1d.weight, mask, cache.lengths)
        q, k, v = mx.split(qkv, [config.linear_key_dim, 2 * config.linear_key_dim], axis=-1)
        y, cache[1] = gated_delta(
            q.reshape(batch, length, config.linear_num_key_heads, -1),
            k.reshape(batch, length, config.linear_num_key_heads, -1),
            v.reshape(batch, length, config.linear_num_value_heads, -1),
            a,
            b,
            self.A_log,
            self.dt_bias,
            cache[1],
            mask,
        )
        cache.advance(length)
        y = self.norm(y, z.reshape(batch, length, config.linear_num_value_heads, -1))
        return self.out_proj(y.reshape(batch, length, -1))

    @staticmethod
    def make_cache() -> ArraysCache:
        """Return an empty cache of one sequence: [convolution window, recurrent state]."""
        return ArraysCache(size=2)

    @staticmethod
    def state_bytes(config: ModelConfig, length: int, activation_bytes: int) -> int:
        """Return the bytes of one layer's window and state for one sequence, whatever its length."""
        window = (config.linear_conv_kernel_dim - 1) * config.linear_conv_dim * activation_bytes
        return window + _state_values(config) * FLOAT32_BYTES

    @staticmethod
    def scratch_bytes(
        config: ModelConfig, batch: int, tokens: int, length: int, activation_bytes: int, *, holds_scores: bool
    ) -> int:
        """Return an upper bound on the activations of one block; see `GatedAttention.scratch_bytes`."""
        block = min(tokens, mixer_block())
        channels = 8 * config.linear_conv_dim + 8 * config.linear_value_dim + 4 * config.hidden_size
        return batch * (block * channels * FLOAT32_BYTES + 6 * _state_values(config) * FLOAT32_BYTES)

    def token_mixer(self, x: "Vector", y: np.ndarray, pool: "Pool", max_context: int) -> TokenMixer:
        """Build the CPU program of one token; see `GatedAttention.token_mixer`."""
        return _TokenDelta(self, x, y, pool)


def _state_values(config: ModelConfig) -> int:
    return config.linear_num_value_heads * config.linear_value_head_dim * config.linear_key_head_dim


class _TokenDelta:
    """TokenMixer of a GatedDeltaNet."""

    def __init__(self, mixer: GatedDeltaNet, x: "Vector", y: np.ndarray, pool: "Pool"):
        from ...ops.cpu import decode_tasks as tasks
        from ...ops.cpu.elementwise import CHANNELS
        from ...ops.cpu.program import Operation
        from ..cpu_layers import product, vector_of

        config = mixer.config
        channels, heads, taps = config.linear_conv_dim, config.linear_num_value_heads, config.linear_conv_kernel_dim
        key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self._window_size, self._state_size = (taps - 1) * channels, _state_values(config)
        sizes = {"qkv": channels, "z": config.linear_value_dim, "b": heads, "a": heads}
        qkv, z, b, a = (pool.floats(name, size) for name, size in sizes.items())
        inputs = _projections(mixer, x, (qkv, z, b, a), pool)
        convolved, out = pool.floats("convolved", channels), pool.vector("delta", config.linear_value_dim)
        conv_weight = vector_of(mixer.conv1d.weight, channels * taps)
        self._convolve = Operation(
            tasks.convolve, -(-channels // CHANNELS), qkv, 0, conv_weight, channels, taps, convolved
        )
        self._delta = Operation(
            tasks.delta,
            heads,
            convolved,
            a,
            b,
            vector_of(mixer.A_log, heads),
            vector_of(mixer.dt_bias, heads),
            0,  # the state
            z,
            vector_of(mixer.norm.weight, value_dim),
            config.linear_num_key_heads,
            heads,
            key_dim,
            value_dim,
            float(mixer.norm.eps),
            out.data,
            nbytes=4 * self._state_size,
        )
        output = product(mixer.out_proj, out, y)
        self.operations = [*inputs, self._convolve, self._delta, *out.permutes, output]

    def set(self, arrays: Sequence[mx.array], position: int) -> None:
        """Point the operations at the window and the state: see `TokenMixer.set`."""
        from ...ops.cpu.arrays import address, view

        window, state = (view(array, np.float32) for array in arrays)
        if window.size != self._window_size or state.size != self._state_size:
            raise other_cache(arrays)
        self._convolve.arguments[1] = address(window)
        self._delta.arguments[5] = address(state)


def _projections(mixer: GatedDeltaNet, x: "Vector", parts: Sequence[np.ndarray], pool: "Pool") -> "list[Operation]":
    """Build the mixer's projections, split into qkv, z, b and a."""
    from ...ops.cpu import decode_tasks as tasks
    from ...ops.cpu.program import Operation, together
    from ..cpu_layers import product

    linears = mixer.projections()
    outputs = [pool.floats(f"projected {i}", linear.weight.shape[0]) for i, linear in enumerate(linears)]
    # Find where each value lies by splitting positions instead of values.
    starts = np.cumsum([0, *(output.size for output in outputs)])
    positions = [mx.arange(start, end)[None, None] for start, end in itertools.pairwise(starts.tolist())]
    gathers = []
    for place, part in zip(mixer.split(*positions), parts, strict=True):
        index = np.array(place, np.int64).reshape(-1)
        source = int(np.searchsorted(starts, index[0], "right")) - 1
        if index.size == outputs[source].size and (np.diff(index) == 1).all():
            outputs[source] = part
        else:
            gathers.append(Operation(tasks.gather, 1, outputs[source], index - starts[source], part.size, part))
    products_ = [product(linear, x, output) for linear, output in zip(linears, outputs, strict=True)]
    return [*together(products_), *together(gathers)]

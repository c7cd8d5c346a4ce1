"""GatedDeltaNet: linear attention by the gated delta rule, with a convolution window and a recurrent state."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_ssm_mask

from ...config import ModelConfig
from ...ops.gated_delta import conv1d_silu, gated_delta
from ...ops.rms_norm_gated import rms_norm_gated
from ..caches import ArraysCache
from ..layers import Linear, QuantizationOf
from .blocks import FLOAT32_BYTES, MIXER_BLOCK


class RMSNormGated(nn.Module):
    """``rms_norm(x) * silu(gate)``, product and SiLU in float32."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones(dims)
        self.eps = eps

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return rms_norm_gated(x, gate, self.weight, self.eps)


class DepthwiseConv(nn.Module):
    """Holder of a causal depthwise convolution's weight, shape (channels, kernel, 1)."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, 1))


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule, behind a short causal convolution.

    Subclasses say how a token's projections are stored. Reference: Yang et al. 2024, arXiv:2412.06464.
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
        """The stored projections of (B, L, H)."""
        raise NotImplementedError

    def split(self, *projected: mx.array) -> tuple[mx.array, ...]:
        """Their results as qkv (B, L, C), z (B, L, Hv * Dv), b and a (B, L, Hv)."""
        raise NotImplementedError

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """Shapes (B, L, H) in and out; the cache is advanced by L."""
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
        """Return an upper bound on the activations of one block; arguments as `GatedAttention.scratch_bytes`."""
        block = min(tokens, MIXER_BLOCK)
        channels = 8 * config.linear_conv_dim + 8 * config.linear_value_dim + 4 * config.hidden_size
        return batch * (block * channels * FLOAT32_BYTES + 6 * _state_values(config) * FLOAT32_BYTES)


def _state_values(config: ModelConfig) -> int:
    return config.linear_num_value_heads * config.linear_value_head_dim * config.linear_key_head_dim

"""Token mixers of the Qwen3.5 and Qwen3-Next family: gated full attention and GatedDeltaNet.

Weight names are the checkpoints' own. Caches are mlx_lm's: KVCache for attention, ArraysCache with
[convolution window, recurrent state] for GatedDeltaNet; their batched forms work too.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, create_ssm_mask
from mlx_lm.models.rope_utils import initialize_rope

from ..config import ModelConfig
from ..ops.attention import attention
from ..ops.gated_delta import conv1d_silu, gated_delta
from ..ops.rms_norm_gated import rms_norm_gated
from .layers import Linear, QuantizationOf

MIXER_BLOCK = 256
"""Tokens that a mixer takes at a time. A constant: it bounds the scratch of a long prompt (attention
scores, projections) without making bits depend on the memory limit."""


class GatedAttention(nn.Module):
    """Full attention whose output is gated by ``sigmoid`` of a second half of q_proj.

    Queries and keys are RMS-normalised a head; rotary embedding covers part of each head.
    """

    def __init__(self, config: ModelConfig, path: str, quantization_of: QuantizationOf):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        width, kv_width = config.head_dim * self.num_heads, config.head_dim * self.num_kv_heads
        for name, inputs, outputs in (
            ("q_proj", config.hidden_size, 2 * width),
            ("k_proj", config.hidden_size, kv_width),
            ("v_proj", config.hidden_size, kv_width),
            ("o_proj", width, config.hidden_size),
        ):
            quantization = quantization_of(f"{path}.{name}")
            setattr(self, name, Linear(inputs, outputs, quantization, bias=config.attention_bias))
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        rope = dict(config.rope_parameters)
        self.rotary_dim = int(config.head_dim * rope.get("partial_rotary_factor", 0.25))
        self.rope = initialize_rope(
            self.rotary_dim,
            base=float(rope.get("rope_theta", 10_000.0)),
            traditional=False,
            scaling_config=rope or None,
            max_position_embeddings=config.max_position_embeddings,
        )

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """Shapes (B, L, H) in and out; the cache is advanced by L."""
        batch, length, _ = x.shape
        mask = create_attention_mask(x, cache)
        queries, gate = mx.split(self.q_proj(x).reshape(batch, length, self.num_heads, -1), 2, axis=-1)
        keys = self.k_norm(self.k_proj(x).reshape(batch, length, self.num_kv_heads, -1)).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(batch, length, self.num_kv_heads, -1).transpose(0, 2, 1, 3)
        queries = self.rope(self.q_norm(queries).transpose(0, 2, 1, 3), offset=cache.offset)
        keys, values = cache.update_and_fetch(self.rope(keys, offset=cache.offset), values)
        y = attention(queries, keys, values, scale=self.scale, mask=mask, cache=cache)
        y = y.transpose(0, 2, 1, 3).reshape(batch, length, -1)
        return self.o_proj(y * mx.sigmoid(gate.reshape(batch, length, -1)))


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


def mix(mixer: nn.Module, norm: nn.Module, x: mx.array, cache: Any) -> mx.array:
    """``x + mixer(norm(x))`` over (B, L, H), MIXER_BLOCK tokens at a time."""
    length = x.shape[1]
    if length <= MIXER_BLOCK:
        return x + mixer(norm(x), cache)
    blocks = []
    for start in range(0, length, MIXER_BLOCK):
        block = x[:, start : start + MIXER_BLOCK]
        blocks.append(block + mixer(norm(block), cache))
        mx.eval(blocks[-1])
    return mx.concatenate(blocks, axis=1)

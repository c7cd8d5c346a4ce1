"""Gated full attention: a KV cache, grouped heads, and an output gated by the second half of q_proj."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.rope_utils import initialize_rope

from ...errors import CorruptError
from ...formats.foreign import ForeignCode, say
from ...formats.safetensors_header import brief
from ...ops.attention import MAX_SCORE_BYTES, MIN_QUERY_BLOCK, attention
from ..caches import KVCache
from ..config import ModelConfig
from ..layers import Linear, QuantizationOf
from .blocks import FLOAT32_BYTES, KV_STEP, TokenMixer, mixer_block, other_cache

if TYPE_CHECKING:
    from ...ops.cpu.vectors import Pool, Vector


class GatedAttention(nn.Module):
    """Full attention whose output is gated by the sigmoid of the second half of q_proj.

    Queries and keys are RMS-normalised per head; the rotary embedding covers part of each head.
    """

    weight_name = "self_attn"

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
        with ForeignCode(partial(_refuse_rope, rope)):
            self.rope = initialize_rope(
                self.rotary_dim,
                base=float(rope.get("rope_theta", 10_000.0)),
                traditional=False,
                scaling_config=rope or None,
                max_position_embeddings=config.max_position_embeddings,
            )

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """Map (B, L, H) to (B, L, H) and advance the cache by L."""
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

    @staticmethod
    def make_cache() -> KVCache:
        """Return an empty cache of one sequence."""
        return KVCache()

    @staticmethod
    def state_bytes(config: ModelConfig, length: int, activation_bytes: int) -> int:
        """Return the bytes of one layer's keys and values for one sequence of ``length`` tokens."""
        steps = -(-length // KV_STEP) * KV_STEP
        return 2 * steps * config.num_key_value_heads * config.head_dim * activation_bytes

    @staticmethod
    def scratch_bytes(
        config: ModelConfig, batch: int, tokens: int, length: int, activation_bytes: int, *, holds_scores: bool
    ) -> int:
        """Return an upper bound on the activations of one block.

        Args:
            config: The model's dimensions.
            batch: Number of sequences.
            tokens: New tokens per sequence.
            length: Tokens of context at the end of the pass.
            activation_bytes: Size of one activation value.
            holds_scores: Whether attention writes scores to memory.
        """
        block = min(tokens, mixer_block())
        width = config.num_attention_heads * config.head_dim
        projections = batch * block * (8 * width + 4 * config.hidden_size) * activation_bytes
        row = batch * config.num_attention_heads * length * FLOAT32_BYTES
        scores = 3 * row * min(max(MAX_SCORE_BYTES // row, MIN_QUERY_BLOCK), block) if holds_scores else 0
        # A growing cache is copied, and the product over grouped heads repeats the keys or values.
        keys = 2 * batch * length * config.num_key_value_heads * config.head_dim * activation_bytes
        return projections + scores + 3 * keys

    def token_mixer(self, x: "Vector", y: np.ndarray, pool: "Pool", max_context: int) -> TokenMixer:
        """Build the CPU program of one token.

        Args:
            x: The normalised hidden state. Shape (H,).
            y: Output buffer. Shape (H,), float32.
            pool: Scratch memory shared between layers.
            max_context: Maximum length of a sequence, in tokens.

        Raises:
            UnsupportedLayerError: If the operations do not support the layer.
        """
        return _TokenAttention(self, x, y, pool, max_context)


def _refuse_rope(rope: Mapping[str, Any], error: BaseException) -> CorruptError:
    return CorruptError(
        f"[config.json] rope_parameters must describe a rotary embedding that mlx-lm knows, got {brief(dict(rope))} "
        f"({say(error)}). Restore the file."
    )


class _Rotation:
    """Cosines and sines of one position, taken from the model's own rotary embedding a block at a time."""

    BLOCK = 64
    """Positions computed together: evaluated by MLX one by one, they would cost more than a layer of a small model."""

    def __init__(self, rope: nn.Module, half: int):
        from ...ops.cpu.arrays import empty

        self.cos, self.sin, self.half = empty(half), empty(half), half
        self._rope = rope
        self._position = -1
        # One attribute, so that an interrupt can't leave another block's first position.
        self._block = (0, np.empty((0, 2, half), np.float32))

    def turn(self, position: int) -> None:
        """Compute those of a position, unless they are already there."""
        from ...ops.cpu.arrays import floats

        if position == self._position:
            return
        start, rows = self._block
        if not start <= position < start + len(rows):
            probe = np.zeros((1, 1, self.BLOCK, 2 * self.half), np.float32)
            probe[..., : self.half] = 1.0
            turned = floats(self._rope(mx.array(probe), offset=position))
            start, rows = self._block = position, turned.reshape(-1, 2, self.half).copy()  # MLX frees its own
        self.cos[:], self.sin[:] = rows[position - start]
        self._position = position


class _TokenAttention:
    """TokenMixer of a GatedAttention."""

    def __init__(self, mixer: GatedAttention, x: "Vector", y: np.ndarray, pool: "Pool", max_context: int):
        from ...ops.cpu import decode_tasks as tasks
        from ...ops.cpu.program import Operation, together
        from ..cpu_layers import product, vector_of

        heads, kv_heads, dim = mixer.num_heads, mixer.num_kv_heads, mixer.q_norm.weight.shape[0]
        self._kv_heads, self._dim = kv_heads, dim
        half = mixer.rotary_dim // 2
        # Layers of the same shape share their rotation.
        self._rotation = pool.get(("rotation", half), lambda: _Rotation(mixer.rope, half))
        splits = -(-max_context // tasks.SPLIT)
        partial = pool.floats("partial", splits * heads, dim + 2)
        q, k, v = (pool.floats(name, size * dim) for name, size in (("q", 2 * heads), ("k", kv_heads), ("v", kv_heads)))
        inputs = together([product(mixer[f"{n}_proj"], x, out) for n, out in (("q", q), ("k", k), ("v", v))])
        turned, out = pool.floats("turned", heads * dim), pool.vector("attended", heads * dim)
        self._place = Operation(
            tasks.place_heads,
            heads + kv_heads,
            q,
            k,
            v,
            vector_of(mixer.q_norm.weight, dim),
            vector_of(mixer.k_norm.weight, dim),
            self._rotation.cos,
            self._rotation.sin,
            heads,
            kv_heads,
            dim,
            half,
            float(mixer.q_norm.eps),
            turned,
            *[0] * 4,  # keys, values, stride, position
        )
        self._attend = Operation(
            tasks.attend,
            kv_heads * splits,
            turned,
            *[0] * 4,  # keys, values, stride, length
            heads,
            kv_heads,
            dim,
            float(mixer.scale),
            partial,
        )
        self._join = Operation(tasks.join, heads, partial, 0, heads, dim, q, out.data)
        output = product(mixer.o_proj, out, y)
        self.operations = [*inputs, self._place, self._attend, self._join, *out.permutes, output]

    def set(self, arrays: Sequence[mx.array], position: int) -> None:
        """Point the operations at the keys and values: see `TokenMixer.set`."""
        from ...ops.cpu.arrays import address, view

        keys, values = (view(array, np.float32) for array in arrays)
        stride = arrays[0].shape[2] * arrays[0].shape[3]
        if not keys.size == values.size == self._kv_heads * stride or arrays[0].shape[3] != self._dim:
            raise other_cache(arrays)
        at = address(keys), address(values), stride
        self._rotation.turn(position)
        self._place.arguments[13:17] = (*at, position)
        self._attend.arguments[1:5] = (*at, position + 1)
        self._join.arguments[1] = position + 1

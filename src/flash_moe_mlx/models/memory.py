"""Bytes that a hybrid model (GatedDeltaNet and attention) needs beside its expert slots, from its dimensions.

Scratch is an upper bound on MLX's activations in one forward pass, checked against measured peaks by
tests/test_memory.py: each term names the arrays that are alive together.
"""

from dataclasses import dataclass

from ..config import ModelConfig
from ..ops.attention import MAX_SCORE_BYTES, MIN_QUERY_BLOCK
from ..ops.expert_batch import GROUPED_ROWS
from .mixers import MIXER_BLOCK

_FLOAT32 = 4
_KV_STEP = 256  # mlx_lm's KVCache grows by this many tokens
_MARGIN = 4 << 20  # small arrays, graph nodes, allocator rounding


@dataclass(frozen=True)
class HybridCosts:
    """ModelCosts of Qwen3.5-MoE and Qwen3-Next.

    Attributes:
        dense_bytes: Weights kept in memory, in the dtypes that they are loaded as.
        load_bytes: Most that loading one tensor needs for a moment beyond them.
        config: Dimensions.
        activation_bytes: Bytes of one activation value: 4 on the CPU, 2 for bfloat16.
        matvec_bytes: Largest temporary of a dense product: scales and biases in float32, where the reference runs; on
            CUDA dequantised tiles.
        expert_bytes: Largest temporary of one expert's product: its dequantised projection.
        holds_scores: Whether attention writes scores to memory; the CPU kernel does not.
    """

    dense_bytes: int
    load_bytes: int
    config: ModelConfig
    activation_bytes: int
    matvec_bytes: int
    expert_bytes: int
    holds_scores: bool

    def state_bytes(self, batch: int, length: int) -> int:
        c = self.config
        steps = -(-length // _KV_STEP) * _KV_STEP
        attention = c.layer_types.count("full_attention")
        kv = attention * 2 * steps * c.num_key_value_heads * c.head_dim * self.activation_bytes
        window = (c.linear_conv_kernel_dim - 1) * c.linear_conv_dim * self.activation_bytes
        recurrent = c.linear_num_value_heads * c.linear_value_head_dim * c.linear_key_head_dim * _FLOAT32
        return batch * (kv + (c.num_hidden_layers - attention) * (window + recurrent))

    def scratch_bytes(self, batch: int, tokens: int, length: int) -> int:
        moe = self._moe_bytes(batch * tokens)
        mixer = max(self._attention_bytes(batch, tokens, length), self._delta_bytes(batch, tokens))
        hidden = 4 * batch * tokens * self.config.hidden_size * self.activation_bytes
        logits = 4 * batch * self.config.vocab_size * _FLOAT32
        return hidden + max(moe, mixer, logits) + self.matvec_bytes + _MARGIN

    def _moe_bytes(self, rows: int) -> int:
        c = self.config
        routed = rows * c.num_experts_per_tok * c.hidden_size * _FLOAT32
        routing = 8 * rows * c.num_experts * _FLOAT32
        shared = rows * (3 * c.shared_expert_intermediate_size + c.hidden_size) * self.activation_bytes
        combine = 4 * rows * c.hidden_size * _FLOAT32
        pairs = min(rows * c.num_experts_per_tok, GROUPED_ROWS + rows)
        lazy = pairs * (3 * c.moe_intermediate_size + 3 * c.hidden_size)
        return routed + max(routing, combine + shared) + lazy * _FLOAT32 + self.expert_bytes

    def _attention_bytes(self, batch: int, tokens: int, length: int) -> int:
        c = self.config
        if "full_attention" not in c.layer_types:
            return 0
        block = min(tokens, MIXER_BLOCK)
        width = c.num_attention_heads * c.head_dim
        projections = batch * block * (8 * width + 4 * c.hidden_size) * self.activation_bytes
        row = batch * c.num_attention_heads * length * _FLOAT32
        scores = 3 * row * min(max(MAX_SCORE_BYTES // row, MIN_QUERY_BLOCK), block) if self.holds_scores else 0
        # A growing cache is copied, and the product over grouped heads repeats keys or values.
        keys = 2 * batch * length * c.num_key_value_heads * c.head_dim * self.activation_bytes
        return projections + scores + 3 * keys

    def _delta_bytes(self, batch: int, tokens: int) -> int:
        c = self.config
        if "linear_attention" not in c.layer_types:
            return 0
        block = min(tokens, MIXER_BLOCK)
        channels = 8 * c.linear_conv_dim + 8 * c.linear_value_dim + 4 * c.hidden_size
        state = c.linear_num_value_heads * c.linear_value_head_dim * c.linear_key_head_dim
        return batch * (block * channels * _FLOAT32 + 6 * state * _FLOAT32)

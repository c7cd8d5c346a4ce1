"""Bytes that a hybrid model (GatedDeltaNet and attention) needs beside its expert slots, from its dimensions.

Scratch is an upper bound on MLX's activations in one forward pass, checked against measured peaks by
tests/runtime/test_memory.py: each term names the arrays that are alive together.
"""

from dataclasses import dataclass

from ..config import ModelConfig
from ..ops.expert_batch import grouped_rows
from .mixers import MIXERS
from .mixers.blocks import FLOAT32_BYTES

_MARGIN = 4 << 20  # small arrays, graph nodes, allocator rounding


@dataclass(frozen=True)
class HybridMemory:
    """ModelMemory of Qwen3.5-MoE and Qwen3-Next.

    Attributes:
        dense_bytes: Weights kept in memory, in the dtypes that they are loaded as.
        load_bytes: Most that loading one tensor needs for a moment beyond them.
        config: Dimensions.
        activation_bytes: Bytes of one activation value: 4 on the CPU, 2 for bfloat16.
        matvec_bytes: Largest temporary of a dense product: scales and biases in float32, where the reference runs; on
            CUDA dequantised tiles.
        kept_bytes: Freed buffers of products that are kept: on CUDA, where to allocate them anew takes longer than to
            compute them.
        expert_bytes: Largest temporary of one expert's product: its dequantised projection.
        holds_scores: Whether attention writes scores to memory; the CPU kernel does not.
    """

    dense_bytes: int
    load_bytes: int
    config: ModelConfig
    activation_bytes: int
    matvec_bytes: int
    kept_bytes: int
    expert_bytes: int
    holds_scores: bool

    def state_bytes(self, batch: int, length: int) -> int:
        c = self.config
        return batch * sum(MIXERS[kind].state_bytes(c, length, self.activation_bytes) for kind in c.layer_types)

    def scratch_bytes(self, batch: int, tokens: int, length: int) -> int:
        moe = self._moe_bytes(batch * tokens)
        c, sizes = self.config, (batch, tokens, length, self.activation_bytes)
        mixers = (MIXERS[kind] for kind in set(c.layer_types))
        mixer = max(mixer.scratch_bytes(c, *sizes, holds_scores=self.holds_scores) for mixer in mixers)
        hidden = 4 * batch * tokens * c.hidden_size * self.activation_bytes
        logits = 4 * batch * c.vocab_size * FLOAT32_BYTES
        return hidden + max(moe, mixer, logits) + self.matvec_bytes + self.kept_bytes + _MARGIN

    def _moe_bytes(self, rows: int) -> int:
        c = self.config
        routed = rows * c.num_experts_per_tok * c.hidden_size * FLOAT32_BYTES
        routing = 8 * rows * c.num_experts * FLOAT32_BYTES
        shared = rows * (3 * c.shared_expert_intermediate_size + c.hidden_size) * self.activation_bytes
        combine = 4 * rows * c.hidden_size * FLOAT32_BYTES
        pairs = min(rows * c.num_experts_per_tok, grouped_rows() + rows)
        lazy = pairs * (3 * c.moe_intermediate_size + 3 * c.hidden_size)
        return routed + max(routing, combine + shared) + lazy * FLOAT32_BYTES + self.expert_bytes

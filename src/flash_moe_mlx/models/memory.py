"""Memory of a hybrid model (GatedDeltaNet and attention) in addition to its expert slots, from its dimensions.

Scratch is an upper bound on MLX's activations in one forward pass, which tests/runtime/test_memory.py checks against
measured peaks: each term names the arrays that are alive at the same time.
"""

from dataclasses import dataclass

from ..ops.expert_batch import grouped_rows
from .config import ModelConfig
from .mixers import MIXERS
from .mixers.blocks import FLOAT32_BYTES

_MARGIN = 4 << 20  # small arrays, graph nodes, allocator rounding


@dataclass(frozen=True)
class HybridMemory:
    """ModelMemory of Qwen3.5-MoE and Qwen3-Next.

    Attributes:
        dense_bytes: Weights kept in memory, in the dtypes they are loaded as.
        load_bytes: Maximum that loading one tensor needs temporarily beyond them.
        config: The model's dimensions.
        activation_bytes: Size of one activation value: 4 on the CPU, 2 for bfloat16.
        matvec_bytes: Largest temporary of a dense product: scales and biases in float32 for the reference, dequantised
            tiles on CUDA.
        kept_bytes: Freed buffers of products that are kept, on CUDA, where allocating them anew takes longer than
            computing them.
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

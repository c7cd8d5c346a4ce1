"""Memory of an mlx-lm model with streamed experts in addition to its slots, from its parameters and caches alone.

Scratch is a generous estimate, which tests/test_switch_glu.py checks against measured peaks. mlx-lm's attention is not
split into blocks, so without a fused kernel all scores of a pass count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..formats.checkpoint import Checkpoint
from ..ops.backend import backend
from ..ops.dequant_matmul import product_scratch_bytes
from ..ops.expert_batch import grouped_rows
from ..ops.quantized import reference_bytes
from .spec import dense_bytes

CACHE_STEP = 256
"""Number of tokens by which mlx_lm's caches grow."""

_FLOAT32 = 4
_MARGIN = 32 << 20


@dataclass(frozen=True)
class CacheGrowth:
    """Growth of one cache of one sequence.

    Attributes:
        fixed_bytes: Size of the part that does not grow.
        step_bytes: Growth per 256 tokens.
        most_tokens: Length at which it stops growing between passes; None if it never does.
    """

    fixed_bytes: int
    step_bytes: int
    most_tokens: int | None

    def state_bytes(self, length: int) -> int:
        kept = length if self.most_tokens is None else min(length, self.most_tokens)
        return self.fixed_bytes + -(-kept // CACHE_STEP) * self.step_bytes


@dataclass(frozen=True)
class SwitchGLUMemory:
    """ModelMemory of a model whose attention is mlx-lm's.

    Attributes:
        dense_bytes: Weights kept in memory.
        load_bytes: Maximum that loading one tensor needs beyond them.
        caches: Growth of each cache of one sequence.
        hidden_size: Width of the experts' input, H.
        widest: Maximum number of outputs of a dense projection.
        expert_width: Intermediate width of an expert, I.
        vocab_size: Number of outputs of the last projection.
        num_experts: Number of experts, E.
        num_experts_per_tok: Number of experts per token, K.
        score_heads: Number of heads whose scores are stored whole; 0 if a fused kernel computes attention.
        reference_bytes: Scratch of experts that MLX's operations compute; 0 where kernels do.
    """

    dense_bytes: int
    load_bytes: int
    caches: tuple[CacheGrowth, ...]
    hidden_size: int
    widest: int
    expert_width: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int
    score_heads: int
    reference_bytes: int

    @property
    def kept_bytes(self) -> int:
        return product_scratch_bytes(0, self.hidden_size, self.expert_width)  # dense layers are mlx-lm's own

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * sum(cache.state_bytes(length) for cache in self.caches)

    def scratch_bytes(self, batch: int, tokens: int, length: int) -> int:
        rows = batch * tokens
        routed = rows * self.num_experts_per_tok * self.hidden_size * 2
        routing = 8 * rows * self.num_experts
        dense = rows * (8 * self.widest + 8 * self.hidden_size)
        pairs = min(rows * self.num_experts_per_tok, grouped_rows() + rows)
        lazy = pairs * (3 * self.expert_width + 3 * self.hidden_size)
        expert = 2 * self.expert_width * self.hidden_size
        products = 2 * self.kept_bytes  # those in use and those kept
        scores = 3 * batch * self.score_heads * tokens * length
        logits = 4 * batch * self.vocab_size
        values = max(routed + lazy + expert, scores) + routing + dense + logits
        passing = batch * self._pass_bytes(tokens, length)
        return _FLOAT32 * values + passing + products + 2 * self.reference_bytes + _MARGIN  # in use, and being made

    def _pass_bytes(self, tokens: int, length: int) -> int:
        """Return the bytes of caches during a pass: a growing one is copied, and a windowed one also holds the pass."""
        copied = max((cache.state_bytes(length) - cache.fixed_bytes for cache in self.caches), default=0)
        steps = -(-tokens // CACHE_STEP)
        return 2 * copied + steps * sum(cache.step_bytes for cache in self.caches if cache.most_tokens is not None)


def switch_glu_footprint(
    checkpoint: Checkpoint, weights: Mapping[str, mx.array], load_bytes: int, caches: Sequence[CacheGrowth], k: int
) -> SwitchGLUMemory:
    """Return the memory of a model, computed before any weights are read.

    Args:
        checkpoint: The opened checkpoint.
        weights: Dense weights in the dtypes they will be kept in, lazy.
        load_bytes: Maximum that loading one tensor needs.
        caches: Growth of each cache of one sequence.
        k: Number of experts per token.
    """
    layout = checkpoint.layout(checkpoint.moe_layers[0])
    matrices = {name: v.shape[0] for name, v in weights.items() if v.ndim == 2}
    vocab = max((rows for name, rows in matrices.items() if "embed" in name), default=0)
    # Latent attention adds its rotary scores as a mask, which no fused kernel supports.
    whole = backend() == "cpu" or checkpoint.setting("kv_lora_rank") is not None
    return SwitchGLUMemory(
        dense_bytes=dense_bytes(weights),
        load_bytes=load_bytes,
        caches=tuple(caches),
        hidden_size=layout.hidden_size,
        widest=max((rows for rows in matrices.values() if rows != vocab), default=0),
        expert_width=layout.intermediate_size,
        vocab_size=vocab,
        num_experts=max(checkpoint.num_experts(layer) for layer in checkpoint.moe_layers),
        num_experts_per_tok=k,
        score_heads=(checkpoint.setting("num_attention_heads") or 1) if whole else 0,
        reference_bytes=max(reference_bytes(checkpoint.layout(layer)) for layer in checkpoint.moe_layers),
    )

"""StreamingMoE: routes, computes the chosen experts through the executor, and combines. Knows no files or slots."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..experts.executor import ExpertExecutor
from ..experts.slots import PAIRWISE_TOKENS
from ..ops.backend import backend, use_cpu_kernels, use_kernels
from ..ops.finite import first_bad_row, is_finite, non_finite
from .gpu_step import moe_step, norm_of


def route(logits: mx.array, k: int, normalise: bool) -> tuple[mx.array, mx.array]:
    """Choose the K most probable experts by a softmax over all of them, most probable first.

    Among equally probable experts, those of higher index are chosen, and come first, as in mlx-lm's model.

    Args:
        logits: The router's logits. Shape (T, E).
        k: Number of experts per token.
        normalise: Whether to divide the K weights by their sum.

    Returns:
        Ids (T, K) uint32 and weights (T, K) float32.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
    if backend() == "cpu":
        # Sorting all experts takes three times as long there. Ties are broken by the order of the chosen ones below.
        chosen = mx.sort(mx.argpartition(probabilities, kth=-k, axis=-1)[:, -k:], axis=-1)
        order = mx.argsort(mx.take_along_axis(probabilities, chosen, axis=-1), axis=-1)
        ids = mx.take_along_axis(chosen, order, axis=-1)[:, ::-1]
    else:  # backends where MLX's argpartition is a sort
        ids = mx.argsort(probabilities, axis=-1)[:, : -k - 1 : -1]
    weights = mx.take_along_axis(probabilities, ids, axis=-1)
    return ids, weights / weights.sum(axis=-1, keepdims=True) if normalise else weights


def take_unchecked(layers: Iterable[Any]) -> list[tuple[int, mx.array]]:
    """Return the router weights that a GPU's pass left unchecked, by layer, so that no later pass sees them."""
    taken: list[tuple[int, mx.array]] = []
    if backend() == "cpu":
        return taken
    for block in (layer.mlp for layer in layers):
        if isinstance(block, StreamingMoE) and block.unchecked is not None:
            taken.append((block.layer, block.unchecked))
            block.unchecked = None
    return taken


class StreamingMoE(nn.Module):
    """Sparse MoE block with streamed routed experts and a gated shared expert.

    ``sum_k w_k expert_k(x) + sigmoid(g(x)) shared(x) + residual``. Reference: Qwen3.5-MoE in transformers.

    Attributes:
        routed: Executor of the layer's routed experts; set when an engine is attached to the model.
        layer: Index of the layer.
        unchecked: The router's weights of a GPU step, which are checked later to avoid a wait; else None.
    """

    routed: ExpertExecutor

    def __init__(
        self,
        layer: int,
        gate: nn.Module,
        shared_expert: nn.Module,
        shared_expert_gate: nn.Module,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
    ):
        super().__init__()
        self.layer = layer
        self.unchecked: mx.array | None = None
        self.gate = gate
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob

    def __call__(self, x: mx.array, residual: mx.array, rows: mx.array | None = None) -> mx.array:
        """Map (B, L, H) to (B, L, H), in the dtype of ``residual``.

        Args:
            x: Normalised hidden states.
            residual: Tensor that the block's output is added to.
            rows: Indices of the B x L positions that hold tokens; the others are padding, read no experts and stay
                unchanged. None means all positions hold tokens.

        Raises:
            NonFiniteError: If the router's weights are not finite.
            StoreError: If an expert can't be read.
        """
        if rows is not None:
            flat, output = x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1])
            output[rows] = self(flat[rows], output[rows])
            return output.reshape(residual.shape)
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = route(self.gate(flat), self.num_experts_per_tok, self.norm_topk_prob)
        self._check(weights)
        # A GPU computes the shared expert while Python looks at the ids. CPU kernels compute immediately, so they are
        # called after the reads have started.
        shared = () if use_cpu_kernels() else self._shared(flat)
        pending = self.routed.begin(ids, weights, alongside=shared)
        y = pending.combined(flat, weights, *(shared or self._shared(flat)), residual.reshape(flat.shape))
        return y.reshape(residual.shape)

    def step(self, h: mx.array, norm: nn.RMSNorm) -> mx.array | None:
        """Return ``h + self(norm(h))`` for a few tokens on a GPU, in few launches; None if the block has no step.

        Args:
            h: Hidden states without padding. Shape (B, L, H).
            norm: The block's norm.

        Raises:
            NonFiniteError: If the router's weights are not finite.
            StoreError: If an expert can't be read.
        """
        flat = h.reshape(-1, h.shape[-1])
        step = moe_step(self) if use_kernels() and len(flat) <= PAIRWISE_TOKENS else None
        if step is None:
            return None
        ids, weights, _, logits = step.route(flat, norm_of(norm))
        return self.finish(flat, ids, weights, logits, norm).reshape(h.shape)

    def finish(self, h: mx.array, ids: mx.array, weights: mx.array, logits: mx.array, norm: nn.RMSNorm) -> mx.array:
        """Compute ``h + self(norm(h))`` on a GPU, after the router has chosen.

        Args:
            h: Hidden states. Shape (T, H).
            ids: Chosen experts. Shape (T, K).
            weights: The router's weights of these experts. Shape (T, K).
            logits: Logits whose last column is the shared expert's gate.
            norm: The block's norm.

        Raises:
            NonFiniteError: If the router's weights are not finite.
            StoreError: If an expert can't be read.
        """
        step = moe_step(self)
        assert step is not None
        self._check(weights)
        pending = self.routed.begin(ids, weights, alongside=(h, logits))
        return pending.combined(h, weights, step.shared.bank, logits, h, norm_of(norm))

    def _check(self, weights: mx.array) -> None:
        """Check that the router's weights, shape (T, K), are finite: NaN in a hidden state makes all of them NaN.

        Raises:
            NonFiniteError: If they are not.
        """
        if len(weights) <= PAIRWISE_TOKENS and backend() != "cpu":
            self.unchecked = weights
        elif not is_finite(weights):
            raise non_finite(self.layer, "the router's weights", first_bad_row(weights))

    def _shared(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return the shared expert's output (T, H) and its gate's logit (T, 1)."""
        return self.shared_expert(x), self.shared_expert_gate(x)

"""StreamingMoE: route, fetch, compute, combine. Asks the engine for experts; knows nothing of files.

Results do not depend on what is in memory: an expert is always computed on all tokens that chose it in
this forward pass, at once, whichever wave brings it, and outputs are combined in the router's order.
"""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..experts.engine import Wave
from ..experts.slots import PAIRWISE_TOKENS
from ..ops.backend import backend, use_cpu_kernels, use_kernels
from ..ops.expert_batch import expert_ffn_grouped
from ..ops.expert_ffn import expert_ffn
from ..ops.expert_ffn_combine import expert_ffn_combine, shared_expert
from ..ops.finite import first_bad_row, is_finite, non_finite
from ..ops.moe_combine import moe_combine
from ..ops.norm import Norm
from ..ops.numerics import Activation
from ..ops.slot_memory import ExpertBank
from .gpu_step import moe_step, norm_of


class ExpertFetcher(Protocol):
    """What routed experts come from: a StreamingEngine, or a shard of one on another host."""

    def waves(self, layer: int, experts: np.ndarray, counts: np.ndarray) -> Iterator[Wave]: ...

    def reading(self, output: mx.array) -> None: ...

    def record(self, layer: int, experts: np.ndarray, weights: mx.array) -> None: ...


class RoutedExperts:
    """The routed experts of one layer. Holds no weights.

    Attributes:
        layer: Index of the layer.
        unchecked: The router's weights of a step on a GPU, where to look at them at once would be a wait; else None.
    """

    def __init__(self, fetcher: ExpertFetcher, layer: int, hidden_size: int, activation: Activation | None = None):
        """Args: where experts come from, the layer, H, and what is between up and down; None is SwiGLU."""
        self._fetcher = fetcher
        self.layer = layer
        self.unchecked: mx.array | None = None
        self._hidden_size = hidden_size
        self._activation = activation

    def record(self, ids: np.ndarray, weights: mx.array) -> None:
        """Note the router's choice for a trace, ids and weights of shape (T, K)."""
        self._fetcher.record(self.layer, ids, weights)

    def check(self, weights: mx.array) -> None:
        """Check that the router's weights, shape (T, K), are finite: NaN in a hidden state makes all of them NaN.

        Raises:
            NonFiniteError: If they are not.
        """
        if len(weights) <= PAIRWISE_TOKENS and backend() != "cpu":
            self.unchecked = weights
        elif not is_finite(weights):
            raise non_finite(self.layer, "the router's weights", first_bad_row(weights))

    def fetch(self, ids: np.ndarray) -> Iterator[Wave]:
        """Begin to read the experts of ids (T, K) that are not in memory.

        Raises:
            StoreError: If a record can't be read, now or when its wave is asked for.
        """
        return self._fetcher.waves(self.layer, *np.unique(ids, return_counts=True))

    def __call__(
        self, x: mx.array, ids: np.ndarray, waves: Iterator[Wave] | None = None, norm: Norm | None = None
    ) -> mx.array:
        """Outputs of each token's experts.

        Args:
            x: Tokens. Shape (T, H).
            ids: Expert ids in the router's order. Shape (T, K), host memory.
            waves: From ``fetch(ids)``; None fetches here.
            norm: Norm of x, at most PAIRWISE_TOKENS of them; None where they are normalised already.

        Returns:
            Shape (T, K, H), float32.

        Raises:
            StoreError: If a record can't be read.
        """
        waves = self.fetch(ids) if waves is None else waves
        if len(ids) <= PAIRWISE_TOKENS:
            return self._by_pair(x, ids, waves, norm)
        return self._by_expert(x if norm is None else norm.reference(x), ids, waves)

    def combined(
        self,
        x: mx.array,
        ids: np.ndarray,
        waves: Iterator[Wave],
        weights: mx.array,
        shared: mx.array | ExpertBank,
        shared_gate: mx.array,
        residual: mx.array,
        norm: Norm | None = None,
    ) -> mx.array:
        """``moe_combine`` of the experts' outputs, shape (T, H); one operation where all experts are in one wave.

        ``shared`` is the shared expert's output or the shared expert; the bits are the same, however many waves.
        """
        if len(ids) <= PAIRWISE_TOKENS and self._activation is None:
            first = list(islice(waves, 1))
            slots = _slot_table(first[0].slots, ids) if first else None
            if slots is not None and (slots >= 0).all():
                table = mx.array(slots.astype(np.uint32))
                y = expert_ffn_combine(x, first[0].bank, table, weights, shared, shared_gate, residual, norm)
                self._fetcher.reading(y)
                return y
            if isinstance(shared, ExpertBank):
                shared, shared_gate = shared_expert(x, shared, first[0].bank.layout, norm), shared_gate[:, -1:]
            waves = chain(first, waves)
        return moe_combine(self(x, ids, waves, norm), weights, shared, shared_gate, residual)

    def _by_pair(self, x: mx.array, ids: np.ndarray, waves: Iterator[Wave], norm: Norm | None) -> mx.array:
        y = self._outputs(ids)
        for wave in waves:
            slots = _slot_table(wave.slots, ids)
            if (slots >= 0).all():
                y = expert_ffn(x, wave.bank, mx.array(slots.astype(np.uint32)), self._activation, norm)
                self._fetcher.reading(y)
                return y
            tokens, ranks = np.nonzero(slots >= 0)
            pairs = mx.array(slots[tokens, ranks].astype(np.uint32)[:, None])
            part = expert_ffn(x[mx.array(tokens)], wave.bank, pairs, self._activation, norm)
            y[mx.array(tokens * ids.shape[1] + ranks)] = part[:, 0]
            mx.eval(y)
        return y.reshape(*ids.shape, self._hidden_size)

    def _by_expert(self, x: mx.array, ids: np.ndarray, waves: Iterator[Wave]) -> mx.array:
        order = np.argsort(ids, axis=None, kind="stable")
        experts, starts = np.unique(ids.reshape(-1)[order], return_index=True)
        pairs = dict(zip(experts.tolist(), np.split(order, starts[1:]), strict=True))
        y = self._outputs(ids)
        for wave in waves:
            own = [pairs[expert] for expert in wave.slots]
            slots = list(wave.slots.values())
            y = expert_ffn_grouped(y, x, wave.bank, slots, own, ids.shape[1], self._activation)
        return y.reshape(*ids.shape, self._hidden_size)

    def _outputs(self, ids: np.ndarray) -> mx.array:
        return mx.zeros((ids.size, self._hidden_size), dtype=mx.float32)


def _slot_table(slots: Mapping[int, int], ids: np.ndarray) -> np.ndarray:
    """Slot of each id, -1 where it is not in the wave."""
    return np.array([[slots.get(e, -1) for e in row] for row in ids.tolist()], dtype=np.int64)


def route(logits: mx.array, k: int, normalise: bool) -> tuple[mx.array, mx.array]:
    """Softmax over all experts, then the K most probable, most probable first.

    Of equally probable experts those of the higher index are chosen, as mlx-lm's models do, and come first.

    Args:
        logits: Shape (T, E).
        k: Experts a token.
        normalise: Divide the K weights by their sum.

    Returns:
        Ids (T, K) uint32 and weights (T, K) float32.
    """
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1, precise=True)
    if backend() == "cpu":
        # Sorting all experts takes three times as long there. The chosen ones' order decides between equals below.
        chosen = mx.sort(mx.argpartition(probabilities, kth=-k, axis=-1)[:, -k:], axis=-1)
        order = mx.argsort(mx.take_along_axis(probabilities, chosen, axis=-1), axis=-1)
        ids = mx.take_along_axis(chosen, order, axis=-1)[:, ::-1]
    else:  # where MLX's argpartition is a sort
        ids = mx.argsort(probabilities, axis=-1)[:, : -k - 1 : -1]
    weights = mx.take_along_axis(probabilities, ids, axis=-1)
    return ids, weights / weights.sum(axis=-1, keepdims=True) if normalise else weights


class StreamingMoE(nn.Module):
    """Sparse MoE block with streamed routed experts and a gated shared expert.

    ``sum_k w_k expert_k(x) + sigmoid(g(x)) shared(x) + residual``. Reference: Qwen3.5-MoE in transformers.

    Attributes:
        routed: The layer's experts; set when an engine is attached to the model.
    """

    routed: RoutedExperts

    def __init__(
        self,
        gate: nn.Module,
        shared_expert: nn.Module,
        shared_expert_gate: nn.Module,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
    ):
        super().__init__()
        self.gate = gate
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob

    def __call__(self, x: mx.array, residual: mx.array, rows: mx.array | None = None) -> mx.array:
        """Shapes (B, L, H) in and out, in the dtype of ``residual``.

        Args:
            x: Normalised hidden states.
            residual: What the block's output is added to.
            rows: Which of the B x L positions hold tokens; the others are padding, read no experts and stay as
                they are. None: all.

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
        # Two calls: the ids can then be waited for without the shared expert, which a GPU computes
        # while Python looks at them. CPU kernels compute at once: they are called when the reads are under way.
        mx.async_eval(ids, weights)
        shared = None if use_cpu_kernels() else self._shared(flat)
        host_ids = np.array(ids)
        self.routed.check(weights)
        waves = self.routed.fetch(host_ids)
        self.routed.record(host_ids, weights)
        shared = shared or self._shared(flat)
        y = self.routed.combined(flat, host_ids, waves, weights, *shared, residual.reshape(flat.shape))
        return y.reshape(residual.shape)

    def step(self, h: mx.array, norm: nn.RMSNorm) -> mx.array | None:
        """``h + self(norm(h))`` of a few tokens on a GPU, in few launches; None where the block has no such step.

        Args:
            h: Hidden states, none of them padding. Shape (B, L, H).
            norm: The block's norm.

        Raises:
            NonFiniteError: If the router's weights are not finite.
            StoreError: If an expert can't be read.
        """
        flat = h.reshape(-1, h.shape[-1])
        step = moe_step(self) if use_kernels() and len(flat) <= PAIRWISE_TOKENS else None
        if step is None:
            return None
        own_norm = norm_of(norm)
        ids, weights, _, logits = step.route(flat, own_norm)
        mx.async_eval(ids, weights)
        host_ids = np.array(ids)
        self.routed.check(weights)
        waves = self.routed.fetch(host_ids)
        self.routed.record(host_ids, weights)
        y = self.routed.combined(flat, host_ids, waves, weights, step.shared.bank, logits, flat, own_norm)
        return y.reshape(h.shape)

    def _shared(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The shared expert's output (T, H) and its gate's logit (T, 1), begun."""
        shared, gate = self.shared_expert(x), self.shared_expert_gate(x)
        mx.async_eval(shared, gate)
        return shared, gate

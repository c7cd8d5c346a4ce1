"""One token of a decoder layer on a GPU, in few launches: the link between the layers' modules and the kernels.

A GatedDeltaNet layer takes seven launches, a full-attention layer ten: see docs/kernels.md. Nothing is evaluated here
and nothing waits for the host: with all experts in slots, the ids stay on the GPU (`gpu_token.py`). If a matrix is not
quantised, a cache is padded or a layer is unknown, the step is None and the modules run as they do for a prompt.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from ..formats.expert_layout import PROJECTIONS
from ..ops.attention import attention
from ..ops.backend import use_kernels
from ..ops.dequant_matvec import MAX_ROWS
from ..ops.expert_ffn import expert_ffn
from ..ops.expert_ffn_combine import combine_outputs, expert_ffn_combine
from ..ops.gated_delta_step import Columns, gated_delta_conv_step, has_step_kernel
from ..ops.norm import Norm
from ..ops.norm_matvec import Gate, matvec_residual
from ..ops.qk_norm_rope import Heads, qk_norm_rope, rotation
from ..ops.router_topk import MAX_EXPERTS_PER_TOKEN, router_topk
from ..ops.slot_memory import ExpertRecords
from .joined import Projections, SharedRecord, fit, matrix_of
from .mixers.attention import GatedAttention
from .mixers.gated_delta import GatedDeltaNet


def norm_of(norm: nn.RMSNorm) -> Norm:
    """Return a module's norm in the form that kernels take."""
    return Norm(norm.weight, norm.eps)


class DeltaStep:
    """One token of a GatedDeltaNet layer, in three launches."""

    def __init__(self, mixer: GatedDeltaNet, columns: Columns):
        """Join the mixer's projections.

        Args:
            mixer: A mixer all of whose matrices the kernels know.
            columns: Layout of the joined projections' columns.
        """
        self._mixer = mixer
        self._columns = columns
        self.projections = Projections(mixer.projections())

    @property
    def weights(self) -> tuple[mx.array, ...]:
        """Return the arrays that the step reads."""
        mixer = self._mixer
        own = (mixer.conv1d.weight, mixer.A_log, mixer.dt_bias, mixer.norm.weight, mixer.out_proj.scales)
        return (*self.projections.weights, *own)

    @classmethod
    def of(cls, mixer: GatedDeltaNet) -> "DeltaStep | None":
        """Return the step of a mixer, or None if the kernels don't support its matrices or heads."""
        linears = mixer.projections()
        config = mixer.config
        heads = has_step_kernel(config.linear_key_head_dim, config.linear_value_head_dim)
        if not (heads and fit(linears) and fit([mixer.out_proj])):
            return None
        columns = columns_of(mixer)
        return None if columns is None else cls(mixer, columns)

    def __call__(self, x: mx.array, norm: Norm, cache: Any) -> mx.array | None:
        """Return ``x + mixer(norm(x))`` over (B, 1, H) and advance the cache, or None if the cache is unsuitable."""
        if cache.lengths is not None or create_ssm_mask(x, cache) is not None:
            return None
        mixer, config, rows = self._mixer, self._mixer.config, x.reshape(-1, x.shape[-1])
        projected = self.projections(rows, norm)
        window, state = cache[0], cache[1]
        if window is None:
            shape = (len(rows), config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
            window = mx.zeros(shape, projected.dtype)
        if state is None:
            heads = (config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim)
            state = mx.zeros((len(rows), *heads), mx.float32)
        y, cache[0], cache[1] = gated_delta_conv_step(
            projected,
            self._columns,
            window,
            mixer.conv1d.weight,
            mixer.A_log,
            mixer.dt_bias,
            state,
            Norm(mixer.norm.weight, mixer.norm.eps),
        )
        cache.advance(1)
        return matvec_residual(y, matrix_of(mixer.out_proj), rows).reshape(x.shape)


def columns_of(mixer: GatedDeltaNet) -> Columns | None:
    """Return the layout of a mixer's joined projections, or None if the kernel can't express it in steps."""
    starts = np.cumsum([0, *(linear.weight.shape[0] for linear in mixer.projections())]).tolist()
    positions = [mx.arange(start, end)[None, None] for start, end in pairwise(starts)]
    qkv, z, b, a = (np.array(part).reshape(-1) for part in mixer.split(*positions))
    config = mixer.config
    key_heads = config.linear_num_key_heads
    keys = key_heads * config.linear_key_head_dim
    first, pitches = [], []
    for part in (qkv[:keys], qkv[keys : 2 * keys], qkv[2 * keys :], z, b, a):
        heads = part.reshape(key_heads, -1)
        pitch = int(heads[1, 0] - heads[0, 0]) if key_heads > 1 else heads.shape[1]
        expected = heads[0, 0] + pitch * np.arange(key_heads)[:, None] + np.arange(heads.shape[1])
        if not np.array_equal(heads, expected):
            return None
        first.append(int(heads[0, 0]))
        pitches.append(pitch)
    if pitches[0] != pitches[1] or pitches[2] != pitches[3] or pitches[4] != pitches[5]:
        return None
    q, k, v, z_start, b_start, a_start = first
    return Columns(q, k, pitches[0], v, z_start, pitches[2], b_start, a_start, pitches[4])


class AttentionStep:
    """One token of a full-attention layer, in six launches: two write the cache, one is MLX's attention."""

    def __init__(self, mixer: GatedAttention):
        """Join the mixer's projections.

        Args:
            mixer: A mixer all of whose matrices the kernels know, with plain rotary embedding.
        """
        self._mixer = mixer
        self.projections = Projections((mixer.q_proj, mixer.k_proj, mixer.v_proj))
        size = self._size = mixer.q_norm.weight.shape[0]
        queries, keys = mixer.num_heads, mixer.num_kv_heads
        self._heads = Heads(queries, keys, size, 0, 2 * size, 2 * size * queries)

    @property
    def weights(self) -> tuple[mx.array, ...]:
        """Return the arrays that a traced part of the layer reads: none, as attention is built for each token."""
        return ()

    @classmethod
    def of(cls, mixer: GatedAttention) -> "AttentionStep | None":
        """Return the step of a mixer, or None if the kernels don't support its matrices or rotary embedding."""
        known = fit((mixer.q_proj, mixer.k_proj, mixer.v_proj)) and fit([mixer.o_proj])
        rope = mixer.rope
        plain = type(rope) is nn.RoPE and not rope.traditional and rope.scale == 1.0 and rope.base is not None
        even = mixer.rotary_dim % 2 == 0 and mixer.q_norm.weight.shape[0] % 4 == 0
        return cls(mixer) if known and plain and even else None

    def __call__(self, x: mx.array, norm: Norm, cache: Any) -> mx.array | None:
        """Return ``x + mixer(norm(x))`` over (1, 1, H) and advance the cache, or None if the cache is unsuitable."""
        if len(x) != 1 or not isinstance(cache.offset, int):
            return None
        mixer, rows, size = self._mixer, x.reshape(1, -1), self._size
        mask = create_attention_mask(x, cache)
        projected = self.projections(rows, norm)
        turns = rotation(cache.offset, mixer.rotary_dim, mixer.rope.base)
        queries, keys = qk_norm_rope(projected, self._heads, norm_of(mixer.q_norm), norm_of(mixer.k_norm), turns)
        values = projected[:, self._heads.key_start + mixer.num_kv_heads * size :]
        keys, values = cache.update_and_fetch(keys[:, :, None], values.reshape(1, mixer.num_kv_heads, 1, size))
        y = attention(queries[:, :, None], keys, values, scale=mixer.scale, mask=mask, cache=cache)
        gate = Gate(projected, size, size, 2 * size)
        return matvec_residual(y.reshape(1, -1), matrix_of(mixer.o_proj), rows, gate).reshape(x.shape)


class MoEStep:
    """The sparse MoE block for a few tokens: two launches for the experts' ids, two more for the layer's output."""

    def __init__(self, block: Any):
        """Join the router with the shared expert's gate, and pack the shared expert.

        Args:
            block: A StreamingMoE all of whose matrices the kernels know.
        """
        self._block = block
        self._num_experts = block.gate.weight.shape[0]
        self.router = Projections((block.gate, block.shared_expert_gate))
        self.shared = SharedRecord(block.shared_expert)

    @property
    def weights(self) -> tuple[mx.array, ...]:
        """Return the arrays that the step reads."""
        return (*self.router.weights, self.shared.bank.array)

    @classmethod
    def of(cls, block: Any) -> "MoEStep | None":
        """Return the step of a StreamingMoE, or None if the kernels don't support one of its matrices."""
        expert = block.shared_expert
        known = (
            fit((block.gate, block.shared_expert_gate))
            and all(fit([expert[name]]) for name in PROJECTIONS)
            and block.num_experts_per_tok <= MAX_EXPERTS_PER_TOKEN
        )
        return cls(block) if known else None

    def route(
        self, h: mx.array, norm: Norm, slot_table: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Choose each token's experts.

        Args:
            h: Hidden states before the block's norm. Shape (T, H).
            norm: The block's norm.
            slot_table: Slot of each expert of the layer, shape (E,), uint32; None returns ids instead of slots.

        Returns:
            Ids (T, K), weights (T, K), slots (T, K), and logits whose last column is the shared expert's gate.
        """
        logits = self.router(h, norm, mx.float32)
        block = self._block
        chosen = router_topk(logits, self._num_experts, block.num_experts_per_tok, block.norm_topk_prob, slot_table)
        return *chosen, logits

    def finish(
        self, h: mx.array, norm: Norm, bank: ExpertRecords, slots: mx.array, weights: mx.array, logits: mx.array
    ) -> mx.array:
        """Return ``h + moe(norm(h))`` when all experts are in slots, from the arguments and results of ``route``."""
        return expert_ffn_combine(h, bank, slots, weights, self.shared.bank, logits, h, norm)

    def finish_shared(
        self,
        h: mx.array,
        norm: Norm,
        bank: ExpertRecords,
        slots: mx.array,
        weights: mx.array,
        logits: mx.array,
        own: mx.array,
        complete: Callable[[mx.array], mx.array],
    ) -> mx.array:
        """Return the bits of ``finish`` where other ranks compute some of the experts.

        Args:
            h: As in ``finish``, like the five arguments that follow.
            norm: The block's norm.
            bank: The layer's slots.
            slots: Slots of the experts; any slot for those of others.
            weights: Their weights.
            logits: Logits whose last column is the shared expert's gate.
            own: Whether each expert is computed here. Shape (T, K), bool.
            complete: Adds up all ranks' outputs (T, K, H).
        """
        y = complete(mx.where(own[..., None], expert_ffn(h, bank, slots, norm=norm), 0))
        return combine_outputs(y, h, bank.layout, weights, self.shared.bank, logits, h, norm)


_STEPS: tuple[tuple[type[nn.Module], Any], ...] = ((GatedDeltaNet, DeltaStep), (GatedAttention, AttentionStep))
"""Step of each kind of mixer; other mixers run as modules."""


def mixer_step(mixer: Any) -> DeltaStep | AttentionStep | None:
    """Return the step of a mixer, created on first use and stored with it; None if there is none."""
    if "_gpu_step" not in vars(mixer):
        kind = next((step for module, step in _STEPS if isinstance(mixer, module)), None)
        mixer._gpu_step = None if kind is None else kind.of(mixer)
    step: DeltaStep | AttentionStep | None = mixer._gpu_step
    return step


def moe_step(block: Any) -> MoEStep | None:
    """Return the step of a StreamingMoE, created on first use and stored with it; None if there is none."""
    if "_gpu_step" not in vars(block):
        block._gpu_step = MoEStep.of(block)
    step: MoEStep | None = block._gpu_step
    return step


def prepare(layers: Any) -> None:
    """Join the projections of all layers, one layer at a time, so that no step has to. Call before allocating slots."""
    for layer in layers:
        for step in (mixer_step(layer.mixer), _moe_step_of(layer)):
            if isinstance(step, MoEStep):
                groups, _ = step.router.groups, step.shared.bank
            elif step is not None:
                groups = step.projections.groups
            else:
                continue
            for group in groups:
                _ = group.matrix


def _moe_step_of(layer: Any) -> MoEStep | None:
    return moe_step(layer.mlp) if "shared_expert" in layer.mlp else None


def mix(mixer: Any, norm: nn.RMSNorm, x: mx.array, cache: Any) -> mx.array | None:
    """Return ``x + mixer(norm(x))`` for one token per sequence and advance the cache; None if the modules must run."""
    if x.shape[1] != 1 or len(x) > MAX_ROWS or not use_kernels():
        return None
    step = mixer_step(mixer)
    return None if step is None else step(x, norm_of(norm), cache)

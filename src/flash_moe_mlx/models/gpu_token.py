"""One token through a model all of whose experts are in slots, on a GPU: one lazy graph, which never asks the host.

What a layer launches is in `gpu_step.py`. Building it in Python takes longer than running it, so a layer is traced
once with ``mx.compile``; attention, whose cache grows, is built for each token.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..experts.executor import ResidentExperts
from ..ops.backend import use_kernels
from ..ops.slot_memory import ExpertRecords
from .gpu_step import AttentionStep, DeltaStep, MoEStep, mixer_step, moe_step, norm_of

Compiled = Callable[..., Sequence[mx.array]]


class _Window:
    """In place of an ArraysCache while a layer is traced: convolution window and recurrent state."""

    lengths = None
    left_padding = None

    def __init__(self, window: mx.array, state: mx.array):
        self.arrays = [window, state]

    def __getitem__(self, index: int) -> mx.array:
        return self.arrays[index]

    def __setitem__(self, index: int, value: mx.array) -> None:
        self.arrays[index] = value

    def advance(self, count: int) -> None:
        """Do nothing: whoever owns the cache advances it."""

    def make_mask(self, count: int) -> None:
        """Return no mask: one sequence is not padded."""


class LayerToken:
    """One decoder layer's part of a token."""

    def __init__(self, layer: Any, mixer: DeltaStep | AttentionStep, moe: MoEStep):
        """Bind a layer and its steps; nothing is traced yet."""
        self._layer, self._mixer, self._moe = layer, mixer, moe
        self._compiled: Compiled | None = None
        self._traced: list[mx.array] = []

    @classmethod
    def of(cls, layer: Any) -> "LayerToken | None":
        """Return a layer's part; None where the layer has no experts or the kernels don't know its matrices."""
        moe = moe_step(layer.mlp) if "shared_expert" in layer.mlp else None
        mixer = mixer_step(layer.mixer)
        return None if moe is None or mixer is None else cls(layer, mixer, moe)

    def __call__(self, x: mx.array, cache: Any, resident: ResidentExperts) -> tuple[mx.array, mx.array] | None:
        """Run the layer, lazily.

        Args:
            x: Hidden state. Shape (1, 1, H).
            cache: The layer's cache, which is advanced.
            resident: The layer's experts.

        Returns:
            Output (1, 1, H) and the chosen ids (1, K); None, and no cache changed, where the cache is not fit for it.
        """
        norm, slots = norm_of(self._layer.input_layernorm), resident.slots
        if isinstance(self._mixer, AttentionStep):
            h = self._mixer(x, norm, cache)
            if h is None:
                return None
            y, ids = self._function(slots)(h, slots.array, resident.table)
            return y, ids
        if cache.lengths is not None or cache.left_padding is not None or cache[0] is None or cache[1] is None:
            return None
        y, ids, cache[0], cache[1] = self._function(slots)(x, slots.array, resident.table, cache[0], cache[1])
        cache.advance(1)
        return y, ids

    def _function(self, slots: ExpertRecords) -> Compiled:
        """Return the traced function. Traces again after other weights were given."""
        weights = [*self._mixer.weights, *self._moe.weights, self._layer.input_layernorm.weight]
        weights.append(self._layer.post_attention_layernorm.weight)
        known = len(weights) == len(self._traced) and all(a is b for a, b in zip(weights, self._traced, strict=True))
        if self._compiled is None or not known:
            trace = self._after_attention if isinstance(self._mixer, AttentionStep) else self._whole
            own = copy.copy(slots)

            def function(x: mx.array, array: mx.array, *others: mx.array) -> Sequence[mx.array]:
                own.array = array
                return trace(x, own, *others)

            self._compiled, self._traced = compile_layer(function), weights
        return self._compiled

    def _whole(
        self, x: mx.array, slots: ExpertRecords, table: mx.array, window: mx.array, state: mx.array
    ) -> Sequence[mx.array]:
        cache = _Window(window, state)
        h = self._mixer(x, norm_of(self._layer.input_layernorm), cache)
        if h is None:
            raise AssertionError("a single sequence's cache is fit for the step")
        return (*self._after_attention(h, slots, table), *cache.arrays)

    def _after_attention(self, h: mx.array, slots: ExpertRecords, table: mx.array) -> Sequence[mx.array]:
        norm, rows = norm_of(self._layer.post_attention_layernorm), h.reshape(-1, h.shape[-1])
        ids, weights, places, logits = self._moe.route(rows, norm, table)
        y = self._moe.finish(rows, norm, slots, places, weights, logits)
        return y.reshape(h.shape), ids


def compile_layer(function: Compiled) -> Compiled:
    """Trace a layer on its first call."""
    compiled: Compiled = mx.compile(function)
    return compiled


class ResidentDecoder:
    """Decodes single tokens of a model all of whose experts are in slots."""

    def __init__(self, layers: Sequence[Any]):
        """Bind the model's layers."""
        self._layers = list(layers)
        self._tokens: list[LayerToken] | None = None
        self._unknown = False

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copied model makes its own."""

    def __call__(self, hidden: mx.array, caches: Sequence[Any]) -> mx.array | None:
        """Run one token through all layers, lazily.

        Args:
            hidden: Embedded token. Shape (1, 1, H).
            caches: One per layer, advanced by the token.

        Returns:
            Hidden state (1, 1, H); None, and no cache changed, where an expert is missing, the host must see the ids,
            or a layer is not known.
        """
        if self._unknown or not use_kernels():
            return None
        residents = []
        for layer in self._layers:
            routed = getattr(layer.mlp, "routed", None)
            resident = None if routed is None else routed.resident()
            if resident is None:
                return None
            residents.append(resident)
        if self._tokens is None:
            tokens = [LayerToken.of(layer) for layer in self._layers]
            self._unknown = any(token is None for token in tokens)
            if self._unknown:
                return None
            self._tokens = [token for token in tokens if token is not None]
        if any(not _fit(layer, cache) for layer, cache in zip(self._layers, caches, strict=True)):
            return None
        for token, cache, resident in zip(self._tokens, caches, residents, strict=True):
            result = token(hidden, cache, resident)
            if result is None:
                raise AssertionError("a cache that was fit is no longer")
            hidden, ids = result
            resident.used(ids)
        residents[-1].reading(hidden)
        return hidden


def _fit(layer: Any, cache: Any) -> bool:
    """Tell whether a cache is that of one sequence which has begun."""
    if layer.is_linear:
        started = cache[0] is not None and cache[1] is not None
        return started and cache.lengths is None and cache.left_padding is None
    return isinstance(getattr(cache, "offset", None), int)

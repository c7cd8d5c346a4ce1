"""One token on a GPU that finds all experts by itself, in slots or in host memory: one lazy graph, without the host.

What a layer launches is in `gpu_step.py`. Building it in Python takes longer than running it, so layers are traced
once with ``mx.compile``; attention, whose cache grows, is built for each token.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..experts.executor import OtherRanks, ResidentExperts
from ..ops.backend import use_kernels
from ..ops.fetch_records import HostRecords, fetch_records
from ..ops.slot_memory import ExpertRecords
from .gpu_step import AttentionStep, DeltaStep, MoEStep, mixer_step, moe_step, norm_of, prepare

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


class Fetch(NamedTuple):
    """How a layer's experts are fetched into slots: the last arguments of ``ops.fetch_records``."""

    landing: mx.array
    target: mx.array
    records: HostRecords
    after: mx.array


class LayerToken:
    """One decoder layer's part of a token: its mixer, and what follows it."""

    def __init__(self, layer: Any, mixer: DeltaStep | AttentionStep, moe: MoEStep):
        """Bind a layer and its steps."""
        self._layer, self._mixer, self._moe = layer, mixer, moe
        self.is_attention = isinstance(mixer, AttentionStep)

    @classmethod
    def of(cls, layer: Any) -> "LayerToken | None":
        """Return a layer's part; None where the layer has no experts or the kernels don't know its matrices."""
        moe = moe_step(layer.mlp) if "shared_expert" in layer.mlp else None
        mixer = mixer_step(layer.mixer)
        return None if moe is None or mixer is None else cls(layer, mixer, moe)

    def mix(self, x: mx.array, cache: Any) -> mx.array:
        """Return ``x + mixer(norm(x))``; the cache, which `fits`, is advanced."""
        h = self._mixer(x, norm_of(self._layer.input_layernorm), cache)
        if h is None:
            raise AssertionError("a single sequence's cache fits the step")
        return h

    def finish(
        self,
        h: mx.array,
        slots: ExpertRecords,
        table: mx.array,
        fetch: "Fetch | None" = None,
        others: OtherRanks | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Return ``h + moe(norm(h))`` and the chosen ids (1, K).

        Args:
            h: Hidden state. Shape (1, 1, H).
            slots: The layer's slots.
            table: Slot of each expert. Shape (E,), uint32.
            fetch: How experts in no slot are fetched; None if there are none.
            others: Ranks that compute a part of the experts; None if all are computed here.
        """
        norm, rows = norm_of(self._layer.post_attention_layernorm), h.reshape(-1, h.shape[-1])
        ids, weights, places, logits = self._moe.route(rows, norm, table)
        if fetch is not None:
            places = fetch_records(ids, table, *fetch)
        if others is None:
            y = self._moe.finish(rows, norm, slots, places, weights, logits)
        else:
            y = self._moe.finish_shared(rows, norm, slots, places, weights, logits, others.own[ids], others.complete)
        return y.reshape(h.shape), ids

    def choose(self, h: mx.array) -> Sequence[mx.array]:
        """Return h (1, H), the chosen ids, weights, and logits whose last column is the shared expert's gate."""
        rows = h.reshape(-1, h.shape[-1])
        ids, weights, _, logits = self._moe.route(rows, norm_of(self._layer.post_attention_layernorm))
        return rows, ids, weights, logits

    def fits(self, cache: Any) -> bool:
        """Tell whether a cache is that of one sequence which has begun."""
        if self.is_attention:
            return isinstance(getattr(cache, "offset", None), int)
        started = cache[0] is not None and cache[1] is not None
        return started and cache.lengths is None and cache.left_padding is None


class LayerChoice:
    """A layer up to its router's choice, traced as one function: where the host must see the ids."""

    def __init__(self, layer: Any, token: LayerToken):
        """Bind a layer; nothing is traced yet."""
        self._layer, self._token = layer, token
        self._compiled: Compiled | None = None
        self._held: list[tuple[dict[str, Any], str, Any]] = []

    def __call__(self, x: mx.array, cache: Any) -> Sequence[mx.array] | None:
        """Run the layer up to the choice, lazily.

        Args:
            x: Hidden state. Shape (1, 1, H).
            cache: The layer's cache, which is advanced.

        Returns:
            The mixer's output (1, H), ids (1, K), weights (1, K), and logits whose last column is the shared expert's
            gate. None, and no cache changed, where the cache is not fit for it.
        """
        token = self._token
        if not token.fits(cache):
            return None
        if self._compiled is None or not all(owner.get(name) is value for owner, name, value in self._held):
            prepare([self._layer])
            self._held = held_arrays(self._layer)
            self._compiled = compile_layers(token.choose if token.is_attention else self._whole)
        if token.is_attention:
            return self._compiled(token.mix(x, cache))
        *outputs, cache[0], cache[1] = self._compiled(x, cache[0], cache[1])
        cache.advance(1)
        return outputs

    def _whole(self, x: mx.array, window: mx.array, state: mx.array) -> Sequence[mx.array]:
        cache = _Window(window, state)
        return [*self._token.choose(self._token.mix(x, cache)), *cache.arrays]


def layer_choice(layer: Any) -> LayerChoice | None:
    """Return a layer's choice, made on its first use and kept with it; None where the kernels don't know the layer."""
    if "_gpu_choice" not in vars(layer):
        token = LayerToken.of(layer)
        layer._gpu_choice = None if token is None else LayerChoice(layer, token)
    choice: LayerChoice | None = layer._gpu_choice
    return choice


class Segment:
    """Layers that are traced together: what follows one attention, and the GatedDeltaNet layers up to the next."""

    def __init__(self, places: Sequence[int], layers: Sequence[LayerToken]):
        """Bind consecutive layers, of which the first alone may be one of attention; nothing is traced yet.

        Args:
            places: Their indices in the model.
            layers: The layers.
        """
        self.places, self._layers = list(places), list(layers)
        self._states = [place for place, layer in zip(places, layers, strict=True) if not layer.is_attention]
        self._slots: list[ExpertRecords] = []
        self._ways: list[tuple[HostRecords | None, OtherRanks | None]] = []
        self._compiled: Compiled | None = None

    def forget(self) -> None:
        """Trace again at the next call: the layers have been given other weights."""
        self._compiled = None

    def __call__(
        self, hidden: mx.array, caches: Sequence[Any], residents: Sequence[ResidentExperts], after: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        """Run the layers, lazily.

        Args:
            hidden: Hidden state. Shape (1, 1, H).
            caches: Caches of all layers of the model; these layers' are advanced.
            residents: Experts of all layers of the model.
            after: Array to compute before slots are overwritten: the last token's hidden state.

        Returns:
            Hidden state (1, 1, H), and the chosen ids of each layer, (1, K).
        """
        first = self._layers[0]
        if first.is_attention:
            hidden = first.mix(hidden, caches[self.places[0]])
        own = [residents[place] for place in self.places]
        if self._compiled is None or any(
            resident.records is not records or (resident.others is None) != (others is None)
            for resident, (records, others) in zip(own, self._ways, strict=True)
        ):
            self._slots = [copy.copy(resident.slots) for resident in own]
            self._ways = [(resident.records, resident.others) for resident in own]
            self._compiled = compile_layers(self._run)
        states = [caches[place] for place in self._states]
        inputs = [after]
        for resident in own:
            inputs += [resident.slots.array, resident.table]
            if resident.landing is not None:
                inputs += [resident.landing, resident.target]
        inputs += [cache[index] for cache in states for index in (0, 1)]
        outputs = self._compiled(hidden, *inputs)
        ids, arrays = outputs[1 : 1 + len(own)], outputs[1 + len(own) :]
        for number, cache in enumerate(states):
            cache[0], cache[1] = arrays[2 * number : 2 * number + 2]
            cache.advance(1)
        return outputs[0], list(ids)

    def _run(self, hidden: mx.array, *inputs: mx.array) -> Sequence[mx.array]:
        after, *given = inputs
        following = iter(given)
        experts = []
        for slots, (records, others) in zip(self._slots, self._ways, strict=True):
            slots.array, table = next(following), next(following)
            fetch = None if records is None else Fetch(next(following), next(following), records, after)
            experts.append((slots, table, fetch, others))
        ids, arrays = [], []
        for layer, (slots, table, fetch, others) in zip(self._layers, experts, strict=True):
            if not layer.is_attention:
                cache = _Window(next(following), next(following))
                hidden = layer.mix(hidden, cache)
                arrays += cache.arrays
            hidden, chosen = layer.finish(hidden, slots, table, fetch, others)
            ids.append(chosen)
        return [hidden, *ids, *arrays]


def compile_layers(function: Compiled) -> Compiled:
    """Trace layers on their first call."""
    compiled: Compiled = mx.compile(function)
    return compiled


class ResidentDecoder:
    """Decodes single tokens of a model whose experts the GPU finds by itself."""

    def __init__(self, layers: Sequence[Any]):
        """Bind the model's layers."""
        self._layers = list(layers)
        self._tokens: list[LayerToken] = []
        self._segments: list[Segment] = []
        self._residents: list[ResidentExperts] = []
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        self._last: mx.array | None = None  # hidden state of the last token, which has read slots
        self._unknown = False

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """Return None: a copied model makes its own."""

    def __call__(self, hidden: mx.array, caches: Sequence[Any]) -> mx.array | None:
        """Run one token through all layers, lazily.

        Args:
            hidden: Embedded token. Shape (1, 1, H).
            caches: One per layer, advanced by the token.

        Returns:
            Hidden state (1, 1, H); None, and no cache changed, where the host must see the ids or a layer is unknown.
        """
        if self._unknown or not use_kernels() or not (self._are_resident() and self._is_built()):
            return None
        if not all(token.fits(cache) for token, cache in zip(self._tokens, caches, strict=True)):
            return None
        after = mx.zeros_like(hidden) if self._last is None else self._last
        chosen: list[mx.array] = []
        for segment in self._segments:
            hidden, ids = segment(hidden, caches, self._residents, after)
            chosen += ids
        residents = self._residents
        layers, fetched = [each.layer for each in residents], any(each.records is not None for each in residents)
        # One array, since the host reads it later, and each that it reads moves from the GPU's memory to its own.
        residents[-1].used(layers, mx.concatenate(chosen), fetched=fetched)
        residents[-1].reading(hidden)
        self._last = hidden
        return hidden

    def _are_resident(self) -> bool:
        if self._residents and all(resident.is_current() for resident in self._residents):
            return True
        self._residents = []
        found = []
        for layer in self._layers:
            routed = getattr(layer.mlp, "routed", None)
            resident = None if routed is None else routed.resident(layer.mlp.num_experts_per_tok)
            if resident is None:
                return False
            found.append(resident)
        # Reading the last experts of one layer leaves the others as they were, but says that slots have changed.
        self._residents = [layer.mlp.routed.resident(layer.mlp.num_experts_per_tok) for layer in self._layers]
        return True

    def _is_built(self) -> bool:
        """Join layers into segments, on the first call and when they were given other weights."""
        if self._segments and all(owner.get(name) is value for owner, name, value in self._held):
            return True
        for segment in self._segments:
            segment.forget()
        if not self._segments:
            tokens = [LayerToken.of(layer) for layer in self._layers]
            self._tokens = [token for token in tokens if token is not None]
            self._unknown = len(self._tokens) < len(tokens)
            if self._unknown:
                return False
            starts = [place for place, token in enumerate(self._tokens) if token.is_attention]
            edges = sorted({0, *starts, len(tokens)})
            self._segments = [Segment(range(start, end), self._tokens[start:end]) for start, end in pairwise(edges)]
        # Joining projections gives modules their views: once it is done.
        for layer in self._layers:
            prepare([layer])
        self._held = [found for layer in self._layers for found in held_arrays(layer)]
        return True


def held_arrays(layer: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """List every array of a layer, and where it was found."""
    return [
        (module, name, value)
        for module in layer.modules()
        for name, value in module.items()
        if isinstance(value, mx.array)
    ]

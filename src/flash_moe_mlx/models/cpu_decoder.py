"""One token through a hybrid model on the CPU, as tapes: MLX is asked for nothing between embedding and logits.

MLX's lazy evaluation hands over to another thread and back at every result that Python needs, some sixteen times a
layer. Here a layer is one call of compiled code, from the experts of one layer to the router's choice of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import NonFiniteError, RequestError
from ..experts.engine import StreamingEngine
from ..ops.cpu import decode_tasks as tasks
from ..ops.cpu.arrays import address, empty, floats, view
from ..ops.cpu.tape import Operation, Tape
from ..ops.finite import is_finite, non_finite
from .caches import KVCache
from .cpu_layers import (
    ExpertTape,
    Pool,
    UnsupportedLayerError,
    Vector,
    normed,
    product,
    projections_of,
    routed_experts,
    shared_expert,
    together,
    vector_of,
)
from .mixers.attention import GatedAttention
from .mixers.gated_delta import GatedDeltaNet
from .moe_block import StreamingMoE


@dataclass
class _Attention:
    """Arguments that change from token to token, of one layer."""

    place: Operation
    attend: Operation
    join: Operation
    heads: int
    dim: int

    def set(self, arrays: Sequence[mx.array], position: int) -> None:
        keys, values = (view(array, np.float32) for array in arrays)
        stride = arrays[0].shape[2] * arrays[0].shape[3]
        if not keys.size == values.size == self.heads * stride or arrays[0].shape[3] != self.dim:
            raise _other_cache(arrays)
        at = address(keys), address(values), stride
        self.place.arguments[13:17] = (*at, position)
        self.attend.arguments[1:5] = (*at, position + 1)
        self.join.arguments[1] = position + 1


@dataclass
class _Delta:
    """Likewise."""

    convolve: Operation
    delta: Operation
    window_size: int
    state_size: int

    def set(self, arrays: Sequence[mx.array], position: int) -> None:
        window, state = (view(array, np.float32) for array in arrays)
        if window.size != self.window_size or state.size != self.state_size:
            raise _other_cache(arrays)
        self.convolve.arguments[1] = address(window)
        self.delta.arguments[5] = address(state)


def _other_cache(arrays: Sequence[mx.array]) -> RequestError:
    shapes = ", ".join(str(array.shape) for array in arrays)
    return RequestError(
        f"[cache] must be of this model and of one sequence, got arrays of shapes {shapes}. Make it with the model's "
        "make_cache()."
    )


@dataclass
class _Layer:
    """One layer: what leads to the router's choice, and what follows it."""

    mixer: _Attention | _Delta
    begin: list[Operation]
    shared: list[Operation]
    hits: ExpertTape
    misses: ExpertTape
    combine: Operation
    mixed: np.ndarray
    outputs: dict[str, np.ndarray]
    shared_expert: ExpertTape  # holds the memory that ``shared`` reads
    whole: Tape = field(
        init=False
    )  # shared expert and experts that are in memory, combined, and the next layer's begin
    early: Tape = field(init=False)  # the first half of it
    late: Tape = field(init=False)  # experts that had to be read, combined, and the next layer's begin


class CPUDecoder:
    """Decodes single tokens of one hybrid model. Not thread-safe: called with the engine's lock held."""

    def __init__(self, model: Any, max_context: int):
        """Build the tapes.

        Raises:
            UnsupportedLayerError: If the model has what tapes don't know.
        """
        config, text = model.config, model.text_model
        self._engine: StreamingEngine = model.streaming
        self._pool = Pool(int8=model.activation_bits == 8)
        self._held = _held(model)
        attention = next((layer.self_attn for layer in text.layers if not layer.is_linear), None)
        self._rope: Any = None if attention is None else attention.rope
        self._half: int = 0 if attention is None else attention.rotary_dim // 2
        self._k = config.num_experts_per_tok
        self._hidden = empty(config.hidden_size)
        self._ids, self._weights = np.zeros(self._k, np.int64), empty(self._k)
        self._cos, self._sin = empty(self._half), empty(self._half)
        splits = -(-max_context // tasks.SPLIT)
        self._partial = empty(splits * config.num_attention_heads, config.head_dim + 2)
        self._splits = splits
        self._layers = [self._layer(config, index, layer) for index, layer in enumerate(text.layers)]
        self._logits = empty(config.vocab_size)
        last, output = self._pool.vector("last", config.hidden_size), model.output_projection
        self._head = product(output, last, self._logits)
        end = [normed(text.norm, self._hidden, 0, last), *last.orders, self._head]
        self._first = Tape(self._layers[0].begin)
        for layer, following in zip(self._layers, [*(layer.begin for layer in self._layers[1:]), end], strict=True):
            hits, misses = layer.hits, layer.misses
            up = together([layer.shared[0]], [hits.gate_up])
            ordered = together(layer.shared[1:-1], hits.order)
            down = together([layer.shared[-1]], [hits.down])
            layer.early = Tape([*up, *ordered, *down])
            layer.whole = Tape([*up, *ordered, *down, layer.combine, *following])
            layer.late = Tape([misses.gate_up, *misses.order, misses.down, layer.combine, *following])

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copied model makes its own: tapes hold addresses."""

    def fits(self) -> bool:
        """Whether the model's modules and arrays are those that the tapes were built on."""
        return all(owner.get(name) is value for owner, name, value in self._held)

    def step(self, hidden: mx.array, caches: Sequence[Any], room: Sequence[Any], *, logits: bool) -> mx.array | None:
        """Logits (1, 1, vocabulary) of one embedded token (1, 1, H), if asked for; the caches are advanced.

        Args:
            hidden: float32.
            caches: One a layer.
            room: What each one's ``own`` returned.
            logits: Whether to compute them.

        Raises:
            NonFiniteError: If the router's choice or the logits are not finite; as with StoreError, the caches are
                then of no more use.
            RequestError: If a cache is not of this model.
            StoreError: If an expert can't be read.
        """
        np.copyto(self._hidden, floats(hidden).reshape(-1))
        position = max((cache.offset for cache in caches if isinstance(cache, KVCache)), default=0)
        if self._rope is not None:
            self._turn(position)
        for layer, arrays in zip(self._layers, room, strict=True):
            layer.mixer.set(arrays, position)
        for cache in caches:
            if isinstance(cache, KVCache):
                cache.offset += 1
        for tape in (self._layers[-1].whole, self._layers[-1].late):
            tape.set_tasks(self._head, self._head.tasks if logits else 0)
        self._first.play()
        for number, layer in enumerate(self._layers):
            self._experts(number, layer, hidden)
        if not logits:
            return None
        if not is_finite(self._logits):
            raise self._located(len(self._layers), hidden)
        return mx.array(self._logits)[None, None]

    def _located(self, number: int, embedded: mx.array) -> NonFiniteError:
        """Find out what made a router's logits, or the model's, not finite: what they came from is still in memory.

        Args:
            number: The router's layer; the number of layers for the model's logits.
            embedded: The token.
        """
        for where, array in self._layers[number - 1].outputs.items() if number else ():
            if not is_finite(array):
                return non_finite(number - 1, where)
        if number == len(self._layers):
            return non_finite(None if is_finite(self._hidden) else number - 1, "the output projection")
        if number == 0 and not is_finite(embedded):
            return non_finite(None, "the embedding")
        return non_finite(number, "the router" if is_finite(self._layers[number].mixed) else "the mixer")

    def _experts(self, number: int, layer: _Layer, embedded: mx.array) -> None:
        ids = self._ids.tolist()
        if ids[0] < 0:
            raise self._located(number, embedded)
        fetch = self._engine.token(number, ids)
        records = fetch.addresses(ids)
        self._engine.record(number, self._ids[None], self._weights[None])
        if not fetch.misses:
            layer.hits.set(layer.whole, records, range(self._k))
            layer.whole.play()
            return
        absent = set(fetch.misses)
        present = [rank for rank, expert in enumerate(ids) if expert not in absent]
        layer.hits.set(layer.early, [records[rank] for rank in present], present)
        layer.early.play()
        fetch.wait()
        missing = [rank for rank, expert in enumerate(ids) if expert in absent]
        layer.misses.set(layer.late, [records[rank] for rank in missing], missing)
        layer.late.play()

    def _turn(self, position: int) -> None:
        """Cosines and sines of this position, as the model's own rotary embedding makes them."""
        assert self._rope is not None
        probe = np.zeros((1, 1, 1, 2 * self._half), np.float32)
        probe[..., : self._half] = 1.0
        turned = floats(self._rope(mx.array(probe), offset=position)).reshape(2, self._half)
        self._cos[:], self._sin[:] = turned

    # --- building ---

    def _layer(self, config: Any, index: int, layer: Any) -> _Layer:
        if not isinstance(layer.mlp, StreamingMoE):
            raise UnsupportedLayerError("a dense layer")
        hidden = self._hidden
        pool, size = self._pool, config.hidden_size
        x, mixed, after = pool.vector("x", size), pool.floats("mixed", size), pool.vector("after", size)
        mixer: _Attention | _Delta
        if layer.is_linear:
            mixer, body = self._delta(config, layer.linear_attn, x, mixed)
        else:
            mixer, body = self._attention(config, layer.self_attn, x, mixed)
        mlp = layer.mlp
        logits = pool.floats("router", config.num_experts)
        gate = pool.floats(f"gate {index % 2}", 1)  # two: the next layer's is computed before the choice is looked at
        shared_y, y = pool.floats("shared", size), pool.floats("experts", self._k, size)
        router = together([product(mlp.gate, after, logits)], [product(mlp.shared_expert_gate, after, gate)])
        shared = shared_expert(mlp.shared_expert, after, shared_y, pool)
        layout = self._engine.layout(index)
        hits, misses = (routed_experts(name, layout, after, self._k, y, pool) for name in ("hits", "misses"))
        choose = Operation(
            tasks.choose, 1, logits, config.num_experts, self._k, int(mlp.norm_topk_prob), self._ids, self._weights
        )
        begin = [
            normed(layer.input_layernorm, hidden, 0, x),
            *together(x.orders),
            *body,
            normed(layer.post_attention_layernorm, hidden, mixed, after),
            *together(after.orders),
            *router,
            choose,
        ]
        combine = Operation(
            tasks.combine, -(-size // tasks.CHANNELS), y, self._k, size, self._weights, shared_y, gate, hidden
        )
        outputs = {"the experts": y, "the shared expert": shared_y, "the shared expert's gate": gate}
        return _Layer(
            mixer, begin, [shared.gate_up, *shared.order, shared.down], hits, misses, combine, mixed, outputs, shared
        )

    def _delta(self, config: Any, mixer: GatedDeltaNet, x: Vector, y: np.ndarray) -> tuple[_Delta, list[Operation]]:
        channels, heads = config.linear_conv_dim, config.linear_num_value_heads
        pool, values = self._pool, config.linear_value_dim
        sizes = {"qkv": channels, "z": values, "b": heads, "a": heads}
        qkv, z, b, a = (pool.floats(name, size) for name, size in sizes.items())
        inputs = projections_of(mixer, x, (qkv, z, b, a), pool)
        convolved, out = pool.floats("convolved", channels), pool.vector("delta", values)
        taps = config.linear_conv_kernel_dim
        sizes_of = (
            (mixer.conv1d.weight, channels * taps),
            (mixer.A_log, heads),
            (mixer.dt_bias, heads),
            (mixer.norm.weight, config.linear_value_head_dim),
        )
        weights = [vector_of(weight, size) for weight, size in sizes_of]
        convolve = Operation(
            tasks.convolve, -(-channels // tasks.CHANNELS), qkv, 0, weights[0], channels, taps, convolved
        )
        delta = Operation(
            tasks.delta,
            heads,
            convolved,
            a,
            b,
            weights[1],
            weights[2],
            0,
            z,
            weights[3],
            config.linear_num_key_heads,
            heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
            float(mixer.norm.eps),
            out.data,
            nbytes=4 * heads * config.linear_key_head_dim * config.linear_value_head_dim,
        )
        output = product(mixer.out_proj, out, y)
        state_size = heads * config.linear_key_head_dim * config.linear_value_head_dim
        return _Delta(convolve, delta, (taps - 1) * channels, state_size), [
            *inputs,
            convolve,
            delta,
            *out.orders,
            output,
        ]

    def _attention(
        self, config: Any, mixer: GatedAttention, x: Vector, y: np.ndarray
    ) -> tuple[_Attention, list[Operation]]:
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        pool = self._pool
        q, k, v = (pool.floats(name, size * dim) for name, size in (("q", 2 * heads), ("k", kv_heads), ("v", kv_heads)))
        inputs = together([product(mixer[f"{n}_proj"], x, out) for n, out in (("q", q), ("k", k), ("v", v))])
        turned, out = pool.floats("turned", heads * dim), pool.vector("attended", heads * dim)
        place = Operation(
            tasks.place_heads,
            heads + kv_heads,
            q,
            k,
            v,
            vector_of(mixer.q_norm.weight, dim),
            vector_of(mixer.k_norm.weight, dim),
            self._cos,
            self._sin,
            heads,
            kv_heads,
            dim,
            self._half,
            float(mixer.q_norm.eps),
            turned,
            0,
            0,
            0,
            0,
        )
        attend = Operation(
            tasks.attend,
            kv_heads * self._splits,
            turned,
            0,
            0,
            0,
            0,
            heads,
            kv_heads,
            dim,
            float(mixer.scale),
            self._partial,
        )
        join = Operation(tasks.join, heads, self._partial, 0, heads, dim, q, out.data)
        output = product(mixer.o_proj, out, y)
        return _Attention(place, attend, join, kv_heads, dim), [*inputs, place, attend, join, *out.orders, output]


def _held(model: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """Every module and array of the model, and where it was found."""
    found: list[tuple[dict[str, Any], str, Any]] = []

    def walk(module: nn.Module) -> None:
        for name, value in module.items():
            if isinstance(value, mx.array | nn.Module):
                found.append((module, name, value))
            for child in value if isinstance(value, list) else (value,):
                if isinstance(child, nn.Module):
                    walk(child)

    walk(model)
    return found

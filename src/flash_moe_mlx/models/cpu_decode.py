"""One token through a hybrid model on the CPU, as tapes: MLX is asked for nothing between embedding and logits.

MLX's lazy evaluation hands over to another thread and back at every result that Python needs, some sixteen times a
layer. Here a layer is one call of compiled code, from the experts of one layer to the router's choice of the next.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..moe import StreamingMoE
from ..ops.cpu import decode_tasks as tasks
from ..ops.cpu import product_tasks as products
from ..ops.cpu.arrays import KINDS, RECORD_KINDS, address, empty, floats, view
from ..ops.cpu.kernels import Format, affine, dense, order
from ..ops.cpu.tape import Operation, Tape
from ..record import Quantization, RecordLayout
from ..streaming import StreamingEngine
from .caches import KVCache
from .layers import Linear, SwiGLU
from .mixers import GatedAttention, GatedDeltaNet


class UnsupportedLayerError(Exception):
    """A layer that tapes don't know: the model is run the other way."""


class Vector:
    """One or more rows of float32 between operations, and the orders in which products want to read them."""

    def __init__(self, size: int, rows: int = 1, ranks: np.ndarray | None = None):
        self.size = size
        self.data = empty(rows, size)
        self.orders: list[Operation] = []
        self._rows, self._ranks = rows, ranks
        self._ordered: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def input(self, form: Format) -> tuple[Any, Any]:
        """What products with matrices of a format read: x, and its sums a group."""
        if not form.bits:
            return self.data, 0
        lane_weights, factors = order(form)
        key = (form.bits, form.group_size)
        if key not in self._ordered:
            ordered, sums = empty(self._rows, self.size), empty(self._rows, form.groups(self.size))
            ranks = 0 if self._ranks is None else self._ranks
            arguments = (self.data, self.size, lane_weights, factors, form.group_size, ordered, sums, ranks)
            self.orders.append(Operation(tasks.order, self._rows, *arguments, beside=bool(self.orders)))
            self._ordered[key] = ordered, sums
        return self._ordered[key]


def _together(*groups: Sequence[Operation]) -> list[Operation]:
    """Operations that may all begin at once."""
    operations = [operation for group in groups for operation in group]
    for place, operation in enumerate(operations):
        operation.row[3] = int(place > 0)
    return operations


def _format(quantization: Quantization | None, kind: int) -> Format:
    return dense(kind) if quantization is None else affine(quantization.bits, quantization.group_size, kind)


def _product(linear: nn.Module, x: Vector, y: Any) -> Operation:
    """``y = linear(x)``."""
    if not isinstance(linear, Linear):
        raise UnsupportedLayerError(type(linear).__name__)
    weight = linear.weight
    stored = weight if linear.quantization is None else linear.scales
    if stored.dtype not in KINDS:
        raise UnsupportedLayerError(str(stored.dtype))
    form = _format(linear.quantization, KINDS[stored.dtype])
    own = (weight, 0, 0) if linear.quantization is None else (weight, linear.scales, linear.biases)
    bias, kind = (linear.bias, KINDS[linear.bias.dtype]) if "bias" in linear else (0, 0)
    row_bytes = form.row_bytes(x.size)
    arguments = (*own, bias, kind, *x.input(form), weight.shape[0], x.size, row_bytes, y)
    nbytes = weight.shape[0] * row_bytes
    return Operation(products.matrix(form), products.blocks(weight.shape[0]), *arguments, nbytes=nbytes)


def _projections(mixer: GatedDeltaNet, x: Vector, parts: Sequence[np.ndarray]) -> list[Operation]:
    """The mixer's projections, split into qkv, z, b and a."""
    linears = mixer.projections()
    outputs = [empty(linear.weight.shape[0]) for linear in linears]
    # Where each value lies, by splitting positions in place of values.
    starts = np.cumsum([0, *(output.size for output in outputs)])
    positions = [mx.arange(start, end)[None, None] for start, end in itertools.pairwise(starts.tolist())]
    gathers = []
    for place, part in zip(mixer.split(*positions), parts, strict=True):
        index = np.array(place, np.int64).reshape(-1)
        source = int(np.searchsorted(starts, index[0], "right")) - 1
        if index.size == outputs[source].size and (np.diff(index) == 1).all():
            outputs[source] = part
        else:
            gathers.append(Operation(tasks.gather, 1, outputs[source], index - starts[source], part.size, part))
    products_ = [_product(linear, x, output) for linear, output in zip(linears, outputs, strict=True)]
    return [*_together(products_), *_together(gathers)]


def _norm(norm: nn.RMSNorm, x: np.ndarray, added: Any, y: Vector) -> Operation:
    return Operation(tasks.norm, 1, x, added, norm.weight, x.size, float(norm.eps), y.data)


@dataclass
class ExpertTape:
    """Operations of the feed-forward of up to K records.

    Attributes:
        records: Address of each record. Shape (K,), int64.
        ranks: Which of the token's K experts each is. Shape (K,), int64.
        gate_up, order, down: Operations, whose tasks follow the number of records.
        blocks: Tasks of the first and of the last for each record.
    """

    records: np.ndarray
    ranks: np.ndarray
    gate_up: Operation
    order: list[Operation]
    down: Operation
    blocks: tuple[int, int]

    def set(self, tape: Tape, records: Sequence[int], ranks: Sequence[int]) -> None:
        """Make a tape compute these records, for these ranks."""
        count = len(records)
        self.records[:count], self.ranks[:count] = records, ranks
        tape.set_tasks(self.gate_up, count * self.blocks[0])
        for operation in self.order:
            tape.set_tasks(operation, count)
        tape.set_tasks(self.down, count * self.blocks[1])


def _experts(layout: RecordLayout, x: Vector, k: int, y: np.ndarray) -> ExpertTape:
    forms, places = {}, {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        quantization = layout.quantization(projection)
        names = [f"{projection}.{part}" for part in ("weight", "scales", "biases")]
        if f"{projection}.bias" in layout.by_name:
            raise UnsupportedLayerError(f"{projection}.bias")
        kind = RECORD_KINDS[layout.by_name[names[0 if quantization is None else 1]].dtype]
        forms[projection] = _format(quantization, kind)
        present = [layout.by_name[name].offset for name in names if name in layout.by_name]
        places[projection] = (*present, *[0] * (3 - len(present)))
    return _ffn(forms, places, layout.intermediate_size, x, k, y)


def _shared(shared: SwiGLU, x: Vector, y: np.ndarray) -> ExpertTape:
    """The shared expert, as a record that begins at address 0."""
    forms, places = {}, {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(shared, projection)
        if not isinstance(linear, Linear) or "bias" in linear:
            raise UnsupportedLayerError(projection)
        parts = [linear.weight] if linear.quantization is None else [linear.weight, linear.scales, linear.biases]
        if parts[-1].dtype not in KINDS:
            raise UnsupportedLayerError(str(parts[-1].dtype))
        forms[projection] = _format(linear.quantization, KINDS[parts[-1].dtype])
        addresses = [address(view(part, np.uint8)) for part in parts]
        places[projection] = (*addresses, *[0] * (3 - len(addresses)))
    return _ffn(forms, places, shared.gate_proj.weight.shape[0], x, 1, y)


def _ffn(
    forms: dict[str, Format], places: dict[str, tuple[int, ...]], width: int, x: Vector, k: int, y: np.ndarray
) -> ExpertTape:
    gate, down = forms["gate_proj"], forms["down_proj"]
    if forms["up_proj"] != gate:
        raise UnsupportedLayerError("gate_proj and up_proj differ")
    records, ranks = np.zeros(k, np.int64), np.arange(k)
    h, u = Vector(width, k, ranks), empty(k, width)
    row_bytes = gate.row_bytes(x.size)
    first = Operation(
        products.gate_up(gate),
        k * products.blocks(width),
        records,
        *x.input(gate),
        *places["gate_proj"],
        *places["up_proj"],
        width,
        x.size,
        row_bytes,
        h.data,
        u,
        ranks,
        nbytes=2 * k * width * row_bytes,
    )
    last = Operation(
        products.down(down),
        k * products.blocks(x.size),
        records,
        *h.input(down),
        *places["down_proj"],
        x.size,
        width,
        down.row_bytes(width),
        y,
        ranks,
        nbytes=k * x.size * down.row_bytes(width),
    )
    return ExpertTape(records, ranks, first, h.orders, last, (products.blocks(width), products.blocks(x.size)))


@dataclass
class _Attention:
    """Arguments that change from token to token, of one layer."""

    place: Operation
    attend: Operation
    join: Operation

    def set(self, arrays: Sequence[mx.array], position: int) -> None:
        keys, values = arrays
        stride = keys.shape[2] * keys.shape[3]
        at = address(view(keys, np.float32)), address(view(values, np.float32)), stride
        self.place.arguments[13:17] = (*at, position)
        self.attend.arguments[1:5] = (*at, position + 1)
        self.join.arguments[1] = position + 1


@dataclass
class _Delta:
    """Likewise."""

    convolve: Operation
    delta: Operation

    def set(self, arrays: Sequence[mx.array], position: int) -> None:
        window, state = arrays
        self.convolve.arguments[1] = address(view(window, np.float32))
        self.delta.arguments[5] = address(view(state, np.float32))


@dataclass
class _Layer:
    """One layer: what leads to the router's choice, and what follows it."""

    mixer: _Attention | _Delta
    begin: list[Operation]
    shared: list[Operation]
    hits: ExpertTape
    misses: ExpertTape
    combine: Operation
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
        last, output = Vector(config.hidden_size), model.output_projection
        product = _product(output, last, self._logits)
        end = [_norm(text.norm, self._hidden, 0, last), *last.orders, product]
        self._first = Tape(self._layers[0].begin)
        for layer, following in zip(self._layers, [*(layer.begin for layer in self._layers[1:]), end], strict=True):
            hits, misses = layer.hits, layer.misses
            up = _together([layer.shared[0]], [hits.gate_up])
            ordered = _together(layer.shared[1:-1], hits.order)
            down = _together([layer.shared[-1]], [hits.down])
            layer.early = Tape([*up, *ordered, *down])
            layer.whole = Tape([*up, *ordered, *down, layer.combine, *following])
            layer.late = Tape([misses.gate_up, *misses.order, misses.down, layer.combine, *following])

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copied model makes its own: tapes hold addresses."""

    def fits(self) -> bool:
        """Whether the model's modules and arrays are those that the tapes were built on."""
        return all(owner.get(name) is value for owner, name, value in self._held)

    def step(self, hidden: mx.array, caches: Sequence[Any], room: Sequence[Any]) -> mx.array:
        """Logits (1, 1, vocabulary) of one embedded token (1, 1, H); the caches are advanced.

        Args:
            hidden: float32.
            caches: One a layer.
            room: What each one's ``own`` returned.

        Raises:
            StoreError: If an expert can't be read. The caches are then of no more use.
        """
        np.copyto(self._hidden, floats(hidden).reshape(-1))
        position = max((cache.offset for cache in caches if isinstance(cache, KVCache)), default=0)
        if self._rope is not None:
            self._turn(position)
        for layer, arrays, cache in zip(self._layers, room, caches, strict=True):
            layer.mixer.set(arrays, position)
            if isinstance(layer.mixer, _Attention):
                cache.offset += 1
        self._first.play()
        for number, layer in enumerate(self._layers):
            self._experts(number, layer)
        return mx.array(self._logits)[None, None]

    def _experts(self, number: int, layer: _Layer) -> None:
        ids = self._ids.tolist()
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
        x, mixed, normed = Vector(config.hidden_size), empty(config.hidden_size), Vector(config.hidden_size)
        mixer: _Attention | _Delta
        if layer.is_linear:
            mixer, body = self._delta(config, layer.linear_attn, x, mixed)
        else:
            mixer, body = self._attention(config, layer.self_attn, x, mixed)
        mlp = layer.mlp
        logits, gate, shared_y = empty(config.num_experts), empty(1), empty(config.hidden_size)
        router = _together([_product(mlp.gate, normed, logits)], [_product(mlp.shared_expert_gate, normed, gate)])
        shared = _shared(mlp.shared_expert, normed, shared_y)
        y = empty(self._k, config.hidden_size)
        layout = self._engine.layout(index)
        hits, misses = (_experts(layout, normed, self._k, y) for _ in range(2))
        choose = Operation(
            tasks.choose, 1, logits, config.num_experts, self._k, int(mlp.norm_topk_prob), self._ids, self._weights
        )
        begin = [
            _norm(layer.input_layernorm, hidden, 0, x),
            *_together(x.orders),
            *body,
            _norm(layer.post_attention_layernorm, hidden, mixed, normed),
            *_together(normed.orders),
            *router,
            choose,
        ]
        size = config.hidden_size
        combine = Operation(
            tasks.combine, -(-size // tasks.CHANNELS), y, self._k, size, self._weights, shared_y, gate, hidden
        )
        return _Layer(mixer, begin, [shared.gate_up, *shared.order, shared.down], hits, misses, combine)

    def _delta(self, config: Any, mixer: GatedDeltaNet, x: Vector, y: np.ndarray) -> tuple[_Delta, list[Operation]]:
        channels, heads = config.linear_conv_dim, config.linear_num_value_heads
        qkv, z, b, a = empty(channels), empty(config.linear_value_dim), empty(heads), empty(heads)
        inputs = _projections(mixer, x, (qkv, z, b, a))
        convolved, out = empty(channels), Vector(config.linear_value_dim)
        taps = config.linear_conv_kernel_dim
        weights = [floats(array) for array in (mixer.conv1d.weight, mixer.A_log, mixer.dt_bias, mixer.norm.weight)]
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
        product = _product(mixer.out_proj, out, y)
        return _Delta(convolve, delta), [*inputs, convolve, delta, *out.orders, product]

    def _attention(
        self, config: Any, mixer: GatedAttention, x: Vector, y: np.ndarray
    ) -> tuple[_Attention, list[Operation]]:
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q, k, v = empty(2 * heads * dim), empty(kv_heads * dim), empty(kv_heads * dim)
        inputs = _together([_product(mixer[f"{n}_proj"], x, out) for n, out in (("q", q), ("k", k), ("v", v))])
        turned, out = empty(heads * dim), Vector(heads * dim)
        place = Operation(
            tasks.place_heads,
            heads + kv_heads,
            q,
            k,
            v,
            floats(mixer.q_norm.weight),
            floats(mixer.k_norm.weight),
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
        product = _product(mixer.o_proj, out, y)
        return _Attention(place, attend, join), [*inputs, place, attend, join, *out.orders, product]


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

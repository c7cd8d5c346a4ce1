"""One token through a hybrid model on the CPU, as programs: MLX is asked for nothing between embedding and logits.

MLX's lazy evaluation hands over to another thread and back at every result that Python needs, some sixteen times a
layer. Here a layer is one call of compiled code, from the experts of one layer to the router's choice of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import NonFiniteError
from ..experts.executor import TokenExperts
from ..ops.cpu import decode_tasks as tasks
from ..ops.cpu.arrays import empty, floats
from ..ops.cpu.elementwise import CHANNELS
from ..ops.cpu.expert_program import UnsupportedLayerError
from ..ops.cpu.program import ExpertOperations, Operation, Program, together
from ..ops.cpu.vectors import Pool
from ..ops.finite import is_finite, non_finite
from .caches import KVCache
from .cpu_layers import normed, product, shared_expert
from .mixers.blocks import TokenMixer
from .moe_block import StreamingMoE


@dataclass
class _Layer:
    """One layer: what leads to the router's choice, and what follows it.

    Attributes:
        mixer: Its token mixer.
        begin: Operations up to the router's choice.
        shared: The shared expert.
        experts: The routed experts.
        combine: Adds up experts, shared expert and residual.
        mixed: The mixer's output.
        outputs: Arrays to look into when something is not finite, by name.
        whole: Shared expert, experts in memory and combine, then the next layer's begin.
        early: The first part of it, while other experts are being read.
        late: Experts that were read and combine, then the next layer's begin.
        arrived: Experts that were read, where outputs must be exchanged before they are combined.
        rest: Combine and the next layer's begin.
    """

    mixer: TokenMixer
    begin: list[Operation]
    shared: ExpertOperations
    experts: TokenExperts
    combine: Operation
    mixed: np.ndarray
    outputs: dict[str, np.ndarray]
    whole: Program = field(init=False)
    early: Program = field(init=False)
    late: Program = field(init=False)
    arrived: Program = field(init=False)
    rest: Program = field(init=False)

    def build(self, following: list[Operation]) -> None:
        """Build the programs that run once the experts are chosen."""
        first = self.experts.present.stages(self.shared)
        second = self.experts.missing.stages()
        last = [self.combine, *following]
        self.whole, self.early, self.late = Program([*first, *last]), Program(first), Program([*second, *last])
        self.arrived, self.rest = Program(second), Program(last)

    def run(self, ids: np.ndarray, weights: np.ndarray) -> None:
        """Compute the experts that were chosen, and whatever follows up to the next choice."""
        experts = self.experts
        missing = experts.begin(ids, weights)
        first = self.early if missing or experts.exchanges else self.whole
        first.update(experts.present)
        first.run()
        if missing:
            experts.finish()
            second = self.arrived if experts.exchanges else self.late
            second.update(experts.missing)
            second.run()
        if experts.exchanges:
            experts.exchange()
            self.rest.run()

    def set_last_tasks(self, operation: Operation, tasks: int) -> None:
        """Change how many tasks an operation of what follows has."""
        for program in (self.whole, self.late, self.rest):
            program.set_tasks(operation, tasks)


class CPUDecoder:
    """Decodes single tokens of one hybrid model. Not thread-safe: called with the engine's lock held."""

    def __init__(self, model: Any, max_context: int):
        """Build the programs.

        Args:
            model: A model with an engine attached.
            max_context: Maximum length of a sequence, in tokens.

        Raises:
            UnsupportedLayerError: If the model has what programs don't know.
        """
        config, text = model.config, model.text_model
        self._pool = Pool(int8=model.activation_bits == 8)
        self._held = _held(model)
        self._k = config.num_experts_per_tok
        self._max_context = max_context
        self._hidden = empty(config.hidden_size)
        self._ids, self._weights = np.zeros(self._k, np.int64), empty(self._k)
        self._layers = [self._layer(config, index, layer) for index, layer in enumerate(text.layers)]
        self._logits = empty(config.vocab_size)
        last, output = self._pool.vector("last", config.hidden_size), model.output_projection
        self._head = product(output, last, self._logits)
        end = [normed(text.norm, self._hidden, 0, last), *last.permutes, self._head]
        self._first = Program(self._layers[0].begin)
        for layer, following in zip(self._layers, [*(layer.begin for layer in self._layers[1:]), end], strict=True):
            layer.build(following)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copied model makes its own: programs hold addresses."""

    def fits(self) -> bool:
        """Whether the model's modules and arrays are those that the programs were built on."""
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
        for layer, arrays in zip(self._layers, room, strict=True):
            layer.mixer.set(arrays, position)
        for cache in caches:
            if isinstance(cache, KVCache):
                cache.offset += 1
        self._layers[-1].set_last_tasks(self._head, self._head.tasks if logits else 0)
        self._first.run()
        for number, layer in enumerate(self._layers):
            if self._ids[0] < 0:
                raise self._located(number, hidden)
            layer.run(self._ids, self._weights)
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

    def _layer(self, config: Any, index: int, layer: Any) -> _Layer:
        if not isinstance(layer.mlp, StreamingMoE):
            raise UnsupportedLayerError("a dense layer")
        hidden = self._hidden
        pool, size = self._pool, config.hidden_size
        x, mixed, after = pool.vector("x", size), pool.floats("mixed", size), pool.vector("after", size)
        mixer = layer.mixer.token_mixer(x, mixed, pool, self._max_context)
        mlp = layer.mlp
        logits = pool.floats("router", config.num_experts)
        gate = pool.floats(f"gate {index % 2}", 1)  # two: the next layer's is computed before the choice is looked at
        shared_y, y = pool.floats("shared", size), pool.floats("experts", self._k, size)
        router = together([product(mlp.gate, after, logits)], [product(mlp.shared_expert_gate, after, gate)])
        shared = shared_expert(mlp.shared_expert, after, shared_y, pool)
        experts = mlp.routed.token_experts(after, y, pool)
        choose = Operation(
            tasks.choose, 1, logits, config.num_experts, self._k, int(mlp.norm_topk_prob), self._ids, self._weights
        )
        begin = [
            normed(layer.input_layernorm, hidden, 0, x),
            *together(x.permutes),
            *mixer.operations,
            normed(layer.post_attention_layernorm, hidden, mixed, after),
            *together(after.permutes),
            *router,
            choose,
        ]
        combine = Operation(
            tasks.combine, -(-size // CHANNELS), y, self._k, size, self._weights, shared_y, gate, hidden
        )
        outputs = {"the experts": y, "the shared expert": shared_y, "the shared expert's gate": gate}
        return _Layer(mixer, begin, shared, experts, combine, mixed, outputs)


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

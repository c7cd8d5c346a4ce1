"""CPU decoding of one token of a hybrid model, as compiled programs that run without MLX from embedding to logits.

MLX's lazy evaluation switches to another thread and back for every result that Python needs, about sixteen times per
layer. Here a layer is one call of compiled code, from its experts to the router's choice of the next layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import NonFiniteError
from ..experts.executor import TokenExperts
from ..ops.cpu import decode_tasks as tasks
from ..ops.cpu.arrays import empty
from ..ops.cpu.elementwise import CHANNELS
from ..ops.cpu.expert_program import UnsupportedLayerError
from ..ops.cpu.program import ExpertOperations, Operation, Program, together
from ..ops.cpu.vectors import Pool
from ..ops.finite import is_finite, non_finite
from .caches import KVCache
from .cpu_layers import TokenEmbedding, normed, product, shared_expert
from .mixers.blocks import TokenMixer
from .moe_block import StreamingMoE


@dataclass
class _Layer:
    """One layer's operations and programs, before and after the router's choice.

    Attributes:
        mixer: The layer's token mixer.
        begin: Operations up to the router's choice.
        shared: Operations of the shared expert.
        experts: Operations of the routed experts.
        combine: Sum of experts, shared expert and residual.
        mixed: The mixer's output.
        outputs: Named arrays to inspect if something is not finite.
        whole: Program of shared expert, cached experts and combine, then the next layer's begin.
        early: First part of it, which runs while missing experts are being read.
        late: Program of experts just read and combine, then the next layer's begin.
        arrived: Program of experts just read alone, for outputs that must be exchanged before combine.
        rest: Program of combine and the next layer's begin.
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
        """Build the programs that run after the experts have been chosen."""
        first = self.experts.present.stages(self.shared)
        second = self.experts.missing.stages()
        last = [self.combine, *following]
        self.whole, self.early, self.late = Program([*first, *last]), Program(first), Program([*second, *last])
        self.arrived, self.rest = Program(second), Program(last)

    def run(self, ids: np.ndarray, weights: np.ndarray) -> None:
        """Compute the chosen experts, and everything that follows up to the next choice."""
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
        """Change the number of tasks of an operation that follows the choice."""
        for program in (self.whole, self.late, self.rest):
            program.set_tasks(operation, tasks)


class CPUDecoder:
    """Decodes single tokens of one hybrid model. Not thread-safe: callers hold the engine's lock.

    Attributes:
        embed: Embeddings of token ids.
    """

    def __init__(self, model: Any, max_context: int):
        """Build the programs.

        Args:
            model: A model with an engine attached.
            max_context: Maximum length of a sequence, in tokens.

        Raises:
            UnsupportedLayerError: If programs do not support a part of the model.
        """
        config, text = model.config, model.text_model
        self._pool = Pool(int8=model.activation_bits == 8)
        self._held = _held(model)
        self._k = config.num_experts_per_tok
        self._max_context = max_context
        self._hidden = empty(config.hidden_size)
        self.embed = TokenEmbedding(text.embed_tokens)
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
        """Return None: programs hold addresses, so a copied model builds its own."""

    def fits(self) -> bool:
        """Return whether the model still has the modules and arrays that the programs were built on."""
        owners, names, values = self._held
        return all(map(is_, map(dict.get, owners, names), values))  # hundreds per token: without a loop in Python

    def step(
        self, embedded: np.ndarray, caches: Sequence[Any], room: Sequence[Any], *, logits: bool
    ) -> mx.array | None:
        """Run one token, advance the caches, and return logits (1, 1, vocabulary) if requested.

        Args:
            embedded: The token's embedding. Shape (H,), float32.
            caches: One cache per layer.
            room: The result of each cache's ``own``.
            logits: Whether to compute them.

        Raises:
            NonFiniteError: If the router's choice or the logits are not finite; the caches are then unusable, as they
                are after a StoreError.
            RequestError: If a cache does not belong to this model.
            StoreError: If an expert can't be read.
        """
        np.copyto(self._hidden, embedded)
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
                raise self._located(number, embedded)
            layer.run(self._ids, self._weights)
        if not logits:
            return None
        if not is_finite(self._logits):
            raise self._located(len(self._layers), embedded)
        return mx.array(self._logits.reshape(1, 1, -1))  # in memory: nothing is left to evaluate

    def _located(self, number: int, embedded: np.ndarray) -> NonFiniteError:
        """Find out why a router's logits, or the model's, are not finite, from inputs that are still in memory.

        Args:
            number: Index of the router's layer; the number of layers stands for the model's logits.
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


def _held(model: Any) -> tuple[list[dict[str, Any]], list[str], list[Any]]:
    """Return, for every module and array of the model, its owner, its name there, and itself."""
    owners: list[dict[str, Any]] = []
    names: list[str] = []
    values: list[Any] = []

    def walk(module: nn.Module) -> None:
        for name, value in module.items():
            if isinstance(value, mx.array | nn.Module):
                owners.append(module)
                names.append(name)
                values.append(value)
            for child in value if isinstance(value, list) else (value,):
                if isinstance(child, nn.Module):
                    walk(child)

    walk(model)
    return owners, names, values

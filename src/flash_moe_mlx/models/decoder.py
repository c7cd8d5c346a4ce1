"""The decoder shared by Qwen3.5-MoE and Qwen3-Next: layers of mixer and MoE, caches, logits and the hub's layout."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import NonFiniteError
from ..experts.engine import StreamingEngine
from ..experts.thread_streams import borrow_stream
from ..forks import check_process
from ..ops.backend import backend, use_cpu_kernels, use_kernels
from ..ops.dequant_matvec import MAX_ROWS
from ..ops.finite import first_bad_row, is_finite, non_finite
from . import gpu_step
from .caches import ArraysCache, KVCache, context_length, unpadded_rows
from .checks import DeferredChecks, check_tokens, checked_later, clamped, locate
from .config import ModelConfig
from .gpu_token import ResidentDecoder, layer_choice
from .layers import Embedding, Linear, QuantizationOf, SwiGLU
from .mixers import MIXERS
from .mixers.blocks import mix
from .moe_block import StreamingMoE, take_unchecked
from .position_blocks import block_positions, blocks

if TYPE_CHECKING:
    from .cpu_decoder import CPUDecoder

logger = logging.getLogger(__name__)

STEPPED_TOKENS = 2
"""Maximum number of new tokens of one sequence that the CPU decodes one by one.

Stepping beats a chunk up to about eight tokens, but beyond two a small cache may have to read an expert twice.
"""

Mixers = Mapping[str, Callable[[ModelConfig, str, QuantizationOf], Any]]
"""Mixer of each name in config.json's layer_types: `mixers.MIXERS`, with a model's own variants."""


class DecoderLayer(nn.Module):
    """``h = x + mixer(norm(x))``, then ``h + moe(norm(h))``, or a dense SwiGLU if the layer has no experts."""

    def __init__(self, config: ModelConfig, index: int, path: str, quantization_of: QuantizationOf, mixers: Mixers):
        super().__init__()
        kind = config.layer_types[index]
        self.mixer_name = MIXERS[kind].weight_name
        setattr(self, self.mixer_name, mixers[kind](config, f"{path}.{self.mixer_name}", quantization_of))
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        mlp = f"{path}.mlp"
        if index in config.dense_layers:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, mlp, quantization_of)
        else:
            self.mlp = StreamingMoE(
                layer=index,
                gate=Linear(config.hidden_size, config.num_experts, quantization_of(f"{mlp}.gate")),
                shared_expert=SwiGLU(
                    config.hidden_size, config.shared_expert_intermediate_size, f"{mlp}.shared_expert", quantization_of
                ),
                shared_expert_gate=Linear(config.hidden_size, 1, quantization_of(f"{mlp}.shared_expert_gate")),
                num_experts_per_tok=config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
            )

    @property
    def mixer(self) -> Any:
        """The layer's token mixer, under whichever name the checkpoint has for it."""
        return getattr(self, self.mixer_name)

    def mix(self, x: mx.array, cache: Any) -> mx.array:
        """Return ``h`` and advance the cache."""
        h = gpu_step.mix(self.mixer, self.input_layernorm, x, cache)
        return mix(self.mixer, self.input_layernorm, x, cache) if h is None else h

    def __call__(self, x: mx.array, cache: Any, rows: mx.array | None = None) -> mx.array:
        choice = layer_choice(self) if x.shape[:2] == (1, 1) and rows is None and use_kernels() else None
        chosen = None if choice is None else choice(x, cache)
        if chosen is not None:
            return self.mlp.finish(*chosen, self.post_attention_layernorm).reshape(x.shape)
        h = self.mix(x, cache)
        if rows is None and isinstance(self.mlp, StreamingMoE):
            y = self.mlp.step(h, self.post_attention_layernorm)
            if y is not None:
                return y
        normed = self.post_attention_layernorm(h)
        return self.mlp(normed, h, rows) if isinstance(self.mlp, StreamingMoE) else h + self.mlp(normed)


class TextModel(nn.Module):
    """Embeddings, decoder layers and the final norm."""

    def __init__(self, config: ModelConfig, path: str, quantization_of: QuantizationOf, mixers: Mixers):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, quantization_of(f"{path}.embed_tokens"))
        self.layers = [
            DecoderLayer(config, i, f"{path}.layers.{i}", quantization_of, mixers)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, hidden: mx.array, cache: list[Any], rows: mx.array | None = None) -> mx.array:
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, layer_cache, rows)
        return hidden

    def advance(self, hidden: mx.array, cache: list[Any], rows: mx.array | None = None) -> None:
        """Advance the caches like a call, but skip everything after the last mixer."""
        for layer, layer_cache in zip(self.layers[:-1], cache[:-1], strict=True):
            hidden = layer(hidden, layer_cache, rows)
        # No router sees the input of the last mixer, and the caches may be kept.
        if not is_finite(hidden if rows is None else hidden.reshape(-1, hidden.shape[-1])[rows]):
            raise non_finite(len(self.layers) - 2, "the output")
        self.layers[-1].mix(hidden, cache[-1])


class _Pass(NamedTuple):
    """Result of a pass: logits if they are ready, or the last layer's output and the embeddings, both (B, L, H)."""

    logits: mx.array | None
    hidden: mx.array | None = None
    embedded: mx.array | None = None


class HybridModel(nn.Module):
    """A model whose routed experts are streamed by ``model.streaming``. Subclasses locate its parts.

    Accepted by ``mlx_lm.generate``, ``mlx_lm.stream_generate`` and ``make_prompt_cache``.

    Attributes:
        streaming: The running engine; set by ``attach``.
        runs_ahead: Whether the last pass was lazy, so that the next token may be built while it runs.
        activation_bits: 8 rounds activations of one or two tokens to 8 bits on the CPU; None is exact.
    """

    streaming: StreamingEngine
    activation_bits: int | None = None
    runs_ahead = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self._cpu_decoder: CPUDecoder | None = None
        self._has_other_layers = False  # whether there are layers that CPUDecoder does not support
        self._resident_decoder: ResidentDecoder | None = None
        self._deferred = DeferredChecks()

    @property
    def decodes_singly(self) -> bool:
        """Whether single tokens have a program of their own, which needs no MLX."""
        return self._decoder() is not None

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of activations; ``set_dtype`` changes it, as in mlx-lm's models."""
        return self.text_model.norm.weight.dtype

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that have embeddings."""
        return self.text_model.embed_tokens.weight.shape[0]

    @property
    def text_model(self) -> TextModel:
        raise NotImplementedError

    @property
    def output_projection(self) -> Linear:
        raise NotImplementedError

    def prepare_steps(self) -> None:
        """Arrange matrices for single tokens on a GPU, once all weights are loaded."""
        if use_kernels():
            gpu_step.prepare(self.layers)

    def __repr__(self) -> str:
        """Return one line; `mlx.nn.Module` would list every module of every layer."""
        streaming = getattr(self, "streaming", None)
        layers: Any = getattr(self, "layers", ())
        return f"{type(self).__name__}({len(layers)} layers, {streaming!r})"

    def attach(self, engine: StreamingEngine) -> None:
        """Use ``engine`` as the source of every layer's routed experts."""
        self.streaming = engine
        for index, layer in enumerate(self.layers):
            if isinstance(layer.mlp, StreamingMoE):
                layer.mlp.routed = engine.executor(index)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.text_model.layers

    def _decoder(self) -> "CPUDecoder | None":
        """Return the CPU decoder of single tokens; None on a GPU, without numba, or if it doesn't support the model."""
        if not use_cpu_kernels() or self.dtype != mx.float32 or self._has_other_layers:
            return None
        from ..ops.cpu.expert_program import UnsupportedLayerError
        from .cpu_decoder import CPUDecoder

        if self._cpu_decoder is None or not self._cpu_decoder.fits():
            try:
                self._cpu_decoder = CPUDecoder(self, self.streaming.max_context)
            except UnsupportedLayerError as error:
                reason = f"the CPU's decode step does not know {error}"
                logger.warning("[decode] %s: tokens are decoded through MLX, several times slower.", reason)
                self.streaming.slow_decode = reason
                self._has_other_layers = True
                return None
        return self._cpu_decoder

    def make_cache(self) -> list[Any]:
        """Return empty caches of one sequence, one per layer: mlx_lm's ArraysCache or KVCache."""
        return [layer.mixer.make_cache() for layer in self.layers]

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        logits_to_keep: int | None = None,
    ) -> mx.array:
        """Return the logits of the next token at each position.

        Args:
            inputs: Token ids. Shape (B, L).
            cache: One cache per layer, advanced by L; None starts from an empty context.
            input_embeddings: Embeddings to use instead of the tokens' own. Shape (B, L, H).
            logits_to_keep: Number of last positions to return logits for; None returns all L. With 0 only the caches
                are advanced, and the last layer's experts are computed only while a trace is being recorded.

        Returns:
            Logits of shape (B, L or logits_to_keep, vocabulary). With None and more than 8 positions in total they are
            lazy: a prompt's logits that nobody evaluates cost neither time nor memory. If they are evaluated, MLX's
            product computes them, which is some 50 times slower on a CPU; pass ``logits_to_keep=L`` instead. The memory
            limit counts one position per sequence; the caller accounts for the others, or takes them in blocks from
            `position_logits`.

        Raises:
            MemoryLimitError: If a pass of this size does not fit into the limit.
            NonFiniteError: If NaN or infinity is computed; the caches are then unusable. Logits are checked on a CPU,
                lazy ones only if there is one per sequence.
            RequestError: If the context exceeds max_context, or a token id is outside the vocabulary.
            StoreError: If an expert can't be read.

        On a GPU with all experts in slots, a single token is lazy, and its errors are raised up to two
        tokens later.
        """
        ready, hidden, embedded = self._run(inputs, cache, input_embeddings, logits_to_keep)
        if ready is not None:
            return ready
        assert hidden is not None
        assert embedded is not None
        batch, tokens = hidden.shape[:2]
        lazy = logits_to_keep is None and batch * tokens > MAX_ROWS
        if lazy:
            logits = self.output_projection.deferred(self.text_model.norm(hidden))
        else:
            logits = self.output_projection(self.text_model.norm(hidden[:, -(logits_to_keep or tokens) :]))
        if backend() == "cpu" and (logits.shape[1] == 1 or not lazy):
            self._check_logits(logits, embedded, hidden)
        return logits

    def position_logits(
        self, inputs: mx.array, cache: list[Any] | None = None, *, keep: int | None = None, block_bytes: int
    ) -> Iterator[mx.array]:
        """Run one pass and yield the logits of its last positions, one block after another.

        They have the bits of a call with ``logits_to_keep=keep``. Raises the errors of a call.

        Args:
            inputs: Token ids of one sequence. Shape (1, L).
            cache: One cache per layer, advanced by L; None starts from an empty context.
            keep: Number of last positions whose logits to yield; None takes all L.
            block_bytes: Maximum size of a block's logits in float32, but at least 17 positions.

        Yields:
            Logits of consecutive positions. Shape (1, n, vocabulary).
        """
        tokens = inputs.shape[1]
        keep = tokens if keep is None else keep
        places = blocks(tokens - keep, tokens, block_positions(block_bytes, self.vocabulary_size))
        if len(places) == 1:
            yield self(inputs, cache, logits_to_keep=keep)
            return
        hidden, embedded = self._run(inputs, cache, None, keep)[1:]
        assert hidden is not None
        assert embedded is not None
        for start, end in places:
            logits = self.output_projection(self.text_model.norm(hidden[:, start:end]))
            if backend() == "cpu":
                self._check_logits(logits, embedded, hidden[:, :end])
            yield logits

    def _run(
        self, inputs: mx.array, cache: list[Any] | None, input_embeddings: mx.array | None, logits_to_keep: int | None
    ) -> _Pass:
        """Run the layers, and the output projection where it belongs to them or nothing is asked of it."""
        check_process("model")
        borrow_stream()
        text = self.text_model
        cache = self.make_cache() if cache is None else cache
        later = input_embeddings is None and checked_later(inputs)
        if input_embeddings is None:
            if not later:
                check_tokens(inputs, self.vocabulary_size)
            batch, tokens = inputs.shape
        else:
            batch, tokens = input_embeddings.shape[:2]
        length = tokens + context_length(cache)
        rows = unpadded_rows(cache, tokens)
        with self.streaming.forward_pass(batch, tokens, length, None if rows is None else len(rows), cache):
            self.runs_ahead = False
            if batch == 1 and tokens <= STEPPED_TOKENS:
                kept = tokens if logits_to_keep is None else logits_to_keep
                logits = self._stepped(inputs, input_embeddings, cache, kept)
                if logits is not None:
                    return _Pass(logits)
            if input_embeddings is None:
                given = clamped(inputs, self.vocabulary_size) if later else inputs
                hidden = text.embed_tokens.embed(given, self.dtype)
            else:
                hidden = input_embeddings
            hidden_ahead = self._resident(hidden, cache) if batch == tokens == 1 else None
            self.runs_ahead = hidden_ahead is not None
            if hidden_ahead is not None:
                if logits_to_keep == 0:
                    return _Pass(self._no_logits(1))
                logits = self.output_projection(text.norm(hidden_ahead))
                self._deferred.add(inputs if later else None, logits, self.vocabulary_size)
                return _Pass(logits)
            embedded = hidden = hidden.astype(self.dtype)
            try:
                if logits_to_keep == 0 and not self.streaming.is_recording:
                    text.advance(hidden, cache, rows)
                else:
                    hidden = text(hidden, cache, rows)
            except NonFiniteError as error:
                place = error.token or 0
                raise self._located(embedded, place if rows is None else int(rows[place].item()), error) from None
            finally:
                unchecked = take_unchecked(self.layers)
            if later:
                check_tokens(inputs, self.vocabulary_size)
            self._check_routers(unchecked, embedded, rows)
        if logits_to_keep == 0:
            return _Pass(self._no_logits(batch))
        return _Pass(None, hidden, embedded)

    def diagnose(self, inputs: mx.array, input_embeddings: mx.array | None = None) -> NonFiniteError:
        """Find out where a pass stopped computing finite numbers, by running its last token alone.

        Args:
            inputs: Token ids. Shape (B, L).
            input_embeddings: Embeddings that the pass used instead of the tokens' own. Shape (B, L, H).
        """
        embedded = input_embeddings
        if embedded is None:
            embedded = self.text_model.embed_tokens.embed(inputs[:1, -1:], self.dtype)
        with self.streaming.forward_pass(1, 1, 1):
            embedded = embedded[:1, -1:].astype(self.dtype)
            return self._located(embedded, 0, non_finite(None, "the logits"))

    def _located(self, embedded: mx.array, token: int, found: NonFiniteError) -> NonFiniteError:
        """Run one token, an index into (B x L), alone; return its error, or ``found`` if it is finite."""
        alone = embedded.reshape(-1, embedded.shape[-1])[token][None, None]
        if not is_finite(alone):
            return non_finite(None, "the embedding", token)
        error = locate(lambda: self.text_model(alone, self.make_cache()), self.text_model.layers, token, found)
        take_unchecked(self.layers)
        return error

    def _check_routers(self, unchecked: list[tuple[int, mx.array]], embedded: mx.array, rows: mx.array | None) -> None:
        """Check the routers' weights of a pass. NaN stays in the residual: if the last are fine, all are."""
        if not unchecked or np.isfinite(np.array(unchecked[-1][1])).all():
            return
        for layer, weights in unchecked:
            if not is_finite(weights):
                place = first_bad_row(weights)
                token = place if rows is None else int(rows[place].item())
                raise self._located(embedded, token, non_finite(layer, "the router's weights", token))

    def _check_logits(self, logits: mx.array, embedded: mx.array, hidden: mx.array) -> None:
        if is_finite(logits):
            return
        kept, tokens = logits.shape[1], hidden.shape[1]
        sequence, place = divmod(first_bad_row(logits.reshape(-1, logits.shape[-1])), kept)
        place += tokens - kept
        found = non_finite(None, "the output projection", sequence * tokens + place)
        if not is_finite(hidden[sequence, place]):
            found = non_finite(len(self.layers) - 1, "the output", sequence * tokens + place)
        with self.streaming.forward_pass(1, 1, 1):
            raise self._located(embedded, sequence * tokens + place, found)

    def _resident(self, hidden: mx.array, cache: list[Any]) -> mx.array | None:
        """Run one token lazily if a GPU has all experts in slots; return None if it must take another path."""
        if not use_kernels():
            return None
        if self._resident_decoder is None:
            self._resident_decoder = ResidentDecoder(self.layers)
        return self._resident_decoder(hidden.astype(self.dtype), cache)

    def _stepped(self, inputs: mx.array, embeddings: mx.array | None, cache: list[Any], kept: int) -> mx.array | None:
        """Return logits of the last ``kept`` tokens, run one at a time; None if the decoder can't continue here."""
        decoder = self._decoder()
        if decoder is None:
            return None
        from ..ops.cpu.arrays import floats

        if embeddings is None:
            rows = map(decoder.embed, inputs.reshape(-1).tolist())
        else:
            rows = iter(floats(embeddings)[0])
        tokens = inputs.shape[1] if embeddings is None else embeddings.shape[1]
        logits = []
        for token, embedded in enumerate(rows):
            room = [c.own() if isinstance(c, ArraysCache | KVCache) else None for c in cache]
            if any(arrays is None for arrays in room):
                return None  # happens before the first token, or never
            step = decoder.step(embedded, cache, room, logits=token >= tokens - kept)
            logits += [] if step is None else [step]
        if len(logits) == 1:
            return logits[0]
        return mx.concatenate(logits, axis=1) if logits else self._no_logits(1)

    def _no_logits(self, batch: int) -> mx.array:
        return mx.zeros((batch, 0, self.config.vocab_size), self.dtype)

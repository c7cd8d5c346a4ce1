"""Streaming for any mlx-lm model whose experts are a SwitchGLU: mlx-lm's own model with that module replaced.

Routers, shared experts, scoring and caches remain mlx-lm's. Nothing here is specific to a model: layers are found by
type, and K and the cache sizes by a dry run in which nothing is evaluated.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU, SwitchMLP
from mlx_lm.utils import infer_quant_config

from ..config import StreamingConfig
from ..errors import (
    CorruptError,
    MissingTensorError,
    NonFiniteError,
    RequestError,
    UnsupportedModelError,
)
from ..experts.engine import StreamingEngine
from ..experts.executor import ExpertExecutor
from ..experts.slots import PAIRWISE_TOKENS
from ..experts.thread_streams import borrow_stream
from ..forks import check_process
from ..formats.checkpoint import Checkpoint
from ..formats.expert_names import parse_name
from ..formats.foreign import ForeignCode, say
from ..formats.safetensors_header import TensorInfo, brief
from ..formats.schemes import AFFINE
from ..ops.backend import backend
from ..ops.finite import first_bad_row, is_finite, non_finite
from ..ops.quantized import mlx_arguments
from ..ops.slot_memory import MLX_DTYPES
from .caches import context_length
from .checks import check_tokens, checked_later, clamped, locate, vocabulary_size
from .model_arguments import check_arguments, find_classes, refuse, refuse_weights
from .position_blocks import block_positions, blocks
from .spec import ModelSpec, convert, load_bytes
from .switch_memory import CACHE_STEP, CacheGrowth, switch_glu_footprint
from .table_rows import leave_tables, tables_of

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_PARTS = {SwitchGLU: {"gate_proj", "up_proj", "down_proj", "activation"}, SwitchMLP: {"fc1", "fc2", "activation"}}
"""Modules of routed experts in mlx-lm that are replaced, with their parts."""


class WithoutGate(nn.Module):
    """Activation of SwitchMLP's experts, which have no gate: mlx-lm's own, applied to the up projection alone."""

    def __init__(self, activation: Callable[[mx.array], mx.array]):
        super().__init__()
        self.activation = activation

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return self.activation(up)


class StreamingSwitchGLU(nn.Module):
    """Replacement of mlx-lm's SwitchGLU or SwitchMLP.

    Until an engine is attached, it returns zeros and notes K; the dry run uses this.
    """

    routed: ExpertExecutor | None

    def __init__(self, layer: int, activation: Callable[[mx.array, mx.array], mx.array]):
        super().__init__()
        self.layer = layer
        self.activation = activation
        self.routed = None
        self.num_experts_per_tok = 0
        self.checked = (
            False  # whether the pass is a prompt's, without padding: that its numbers are finite is seen here
        )

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Return each token's expert outputs: x (..., H) and indices (..., K) to (..., K, H), in the dtype of x."""
        shape = (*indices.shape, x.shape[-1])
        if self.routed is None:
            if x.shape[:-1] != indices.shape[:-1]:
                raise UnsupportedModelError(
                    f"[layer {self.layer}] experts must be given ids for each row, got {x.shape} and {indices.shape}. "
                    "Run the model in mlx-lm."
                )
            self.num_experts_per_tok = indices.shape[-1]
            return mx.zeros(shape, x.dtype)
        if self.checked and not is_finite(x):
            row = first_bad_row(x.reshape(-1, x.shape[-1]))
            raise non_finite(self.layer, "what the experts are given", row)
        # mlx-lm's block keeps the weights to itself, so the trace marks them as unknown.
        pending = self.routed.begin(indices.reshape(-1, indices.shape[-1]))
        return pending.run(x.reshape(-1, x.shape[-1])).astype(x.dtype).reshape(shape)


class StreamingModel:
    """Mixin for mlx-lm's model class that runs each forward pass under the engine.

    Attributes:
        streaming: The running engine; set by ``attach``.
        vocabulary_size: Number of token ids that have embeddings; set by ``attach``.
    """

    streaming: StreamingEngine
    vocabulary_size: int

    def __repr__(self) -> str:
        """Return one line; `mlx.nn.Module` would list every module of every layer."""
        streaming = getattr(self, "streaming", None)
        layers: Any = getattr(self, "layers", ())
        return f"{type(self).__name__}({len(layers)} layers, {streaming!r})"

    def attach(self, engine: StreamingEngine) -> None:
        """Use ``engine`` as the source of every layer's routed experts."""
        self.streaming = engine
        self.vocabulary_size = vocabulary_size(self, getattr(self, "args", None))  # type: ignore[arg-type]
        for module in self._switches():
            # A subclass may compute something else.
            activation = None if type(module.activation) is SwiGLU else module.activation
            module.routed = engine.executor(module.layer, activation)
        for table in tables_of(self):  # type: ignore[arg-type]
            table.read_rows = engine.read_rows

    def layers_of_plain_swiglu(self) -> list[int]:
        """Return the layers whose experts kernels compute on a GPU: those without an activation of their own."""
        return [module.layer for module in self._switches() if type(module.activation) is SwiGLU]

    def _switches(self) -> list[StreamingSwitchGLU]:
        modules = self.named_modules()  # type: ignore[attr-defined]
        return [module for _, module in modules if isinstance(module, StreamingSwitchGLU)]

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        logits_to_keep: int | None = None,
    ) -> mx.array:
        """Return logits, shape (B, L or logits_to_keep, vocabulary); see :class:`HybridModel`."""
        check_process("model")
        borrow_stream()
        cache = make_prompt_cache(self) if cache is None else cache
        extra = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
        later = checked_later(inputs)
        if not later and (input_embeddings is None or (inputs is not None and inputs.size)):
            check_tokens(inputs, self.vocabulary_size)
        batch, tokens = (inputs if input_embeddings is None else input_embeddings).shape[:2]
        with self.streaming.forward_pass(batch, tokens, tokens + context_length(cache), caches=cache):
            try:
                with self._checking(batch == 1 and tokens > PAIRWISE_TOKENS):
                    given = clamped(inputs, self.vocabulary_size) if later else inputs
                    logits = super().__call__(given, cache=cache, **extra)  # type: ignore[misc]
            except NonFiniteError as error:
                place = error.token or 0
                raise self._located(inputs[:, place : place + 1], _row(input_embeddings, place), error) from None
            if later:
                check_tokens(inputs, self.vocabulary_size)
        if logits_to_keep is not None:
            logits = logits[:, max(tokens - logits_to_keep, 0) :]
        if logits.shape[1] == 1 and backend() == "cpu" and not is_finite(logits):
            row = first_bad_row(logits[:, -1])
            raise self.diagnose(inputs[row : row + 1], input_embeddings)
        return logits

    def position_logits(
        self, inputs: mx.array, cache: list[Any] | None = None, *, keep: int | None = None, block_bytes: int
    ) -> Iterator[mx.array]:
        """Yield the logits of the last positions in blocks; see :meth:`HybridModel.position_logits`.

        mlx-lm's models compute logits along with their layers, so each block is a pass of its own, which reads its
        experts again.
        """
        cache = make_prompt_cache(self) if cache is None else cache
        tokens = inputs.shape[1]
        first = 0 if keep is None else tokens - keep
        if first > 0:
            self(inputs[:, :first], cache, logits_to_keep=0)
        for start, end in blocks(first, tokens, block_positions(block_bytes, self.vocabulary_size)):
            yield self(inputs[:, start:end], cache, logits_to_keep=end - start)

    def diagnose(self, inputs: mx.array, input_embeddings: mx.array | None = None) -> NonFiniteError:
        """Locate the first non-finite numbers of a pass: see :meth:`HybridModel.diagnose`."""
        with self.streaming.forward_pass(1, 1, 1):
            return self._located(inputs[:1, -1:], _row(input_embeddings, -1), non_finite(None, "the logits"))

    def _located(self, inputs: mx.array, embeddings: mx.array | None, found: NonFiniteError) -> NonFiniteError:
        """Run one token alone and return its error, or ``found`` if it is finite."""
        extra = {} if embeddings is None else {"input_embeddings": embeddings}
        cache = make_prompt_cache(self)
        lists = (m.get("layers") for m in self.modules())  # type: ignore[attr-defined]
        layers = max((found for found in lists if isinstance(found, list)), key=len, default=[])
        call = super().__call__  # type: ignore[misc]
        return locate(lambda: call(inputs, cache=cache, **extra), layers, found.token or 0, found)

    @contextmanager
    def _checking(self, checked: bool) -> Iterator[None]:
        if not checked:
            yield
            return
        switches = self._switches()
        for switch in switches:
            switch.checked = True
        try:
            yield
        finally:
            for switch in switches:
                switch.checked = False


def _row(embeddings: mx.array | None, place: int) -> mx.array | None:
    return None if embeddings is None else embeddings[:1, place:][:, :1]


def prepare(
    checkpoint: Checkpoint, stored: Mapping[str, mx.array], streaming: StreamingConfig, dtype: mx.Dtype
) -> ModelSpec:
    """Build the spec of an mlx-lm model with streamed experts. No weights are read.

    Args:
        checkpoint: The opened checkpoint.
        stored: The checkpoint's dense tensors by stored name, lazy.
        streaming: The arguments of load.
        dtype: Dtype of activations on the CPU; a GPU keeps the checkpoint's own dtypes.

    Raises:
        UnsupportedModelError: If mlx-lm does not know the model type, or its experts are not a SwitchGLU.
        CorruptError: If config.json does not describe the checkpoint.
        RequestError: If this model does not support num_experts_per_tok.
    """
    k = streaming.num_experts_per_tok
    most = max(checkpoint.num_experts(layer) for layer in checkpoint.moe_layers)
    if k is not None and k > most:
        raise RequestError(f"[num_experts_per_tok] must be at most {most}, the experts of a layer, got {k}.")
    config, trained = _with_experts_per_tok(checkpoint.config, k)
    fixed_k = RequestError(
        f"[num_experts_per_tok] can't be changed for {config.get('model_type')}, got {k}. Leave it out."
    )
    try:
        model = _build(config, checkpoint, streaming.trust_remote_code)
    except (CorruptError, UnsupportedModelError) as error:
        if k is None or k == trained:
            raise
        raise fixed_k from error
    swapped = _swap_experts(model, checkpoint)
    experts = _lazy_experts(checkpoint)
    weights = {**stored, **experts}
    with ForeignCode(lambda error: refuse_weights(checkpoint, error)):
        weights = dict(model.sanitize(weights)) if hasattr(model, "sanitize") else weights
        # Expert tensors that sanitize doesn't know, such as other tools' scales, are also read here.
        own = tuple(f"{path}." for path in swapped)
        weights = {name: v for name, v in weights.items() if not name.startswith(own) and name not in experts}
        _quantize(model, weights, checkpoint)

    def dtype_of(_: str, value: mx.array) -> mx.Dtype:
        return dtype if backend() == "cpu" and mx.issubdtype(value.dtype, mx.floating) else value.dtype

    vocabulary = vocabulary_size(model, getattr(model, "args", None))
    tensors = _stored_tensors(checkpoint, stored)
    weights = leave_tables(model, weights, tensors, vocabulary, streaming.table_bytes, dtype_of)
    in_files = {info.name for table in tables_of(model) for info in table.parts.values()}
    if backend() == "cpu":
        weights = convert(weights, dtype_of)
    caches = _cache_growth(model, dtype, str(config["model_type"]))
    found = {module.num_experts_per_tok for module in swapped.values()}
    if min(found) < 1:
        raise CorruptError(
            f"[config.json] each token must have experts, got {trained} for {config.get('model_type')}. "
            "Restore the file."
        )
    if k is not None and found != {k}:
        raise fixed_k
    loaded = {name: value for name, value in stored.items() if name not in in_files}
    note = f"num_experts_per_tok={k} where the model was trained with {trained}"
    return ModelSpec(
        model=model,
        weights=weights,
        footprint=switch_glu_footprint(checkpoint, weights, load_bytes(loaded), caches, max(found)),
        num_experts_per_tok=max(found),
        lossy=(note,) if k is not None and k != trained else (),
    )


def _with_experts_per_tok(config: Mapping[str, Any], k: int | None) -> tuple[dict[str, Any], Any]:
    """Return the config with K set, under the model's own name for it, and the model's original K."""
    config = dict(config)
    text = config
    if isinstance(config.get("text_config"), Mapping):
        text = config["text_config"] = dict(config["text_config"])
    name = next((name for name in _K_NAMES if name in text), None)
    trained = None if name is None else text[name]
    if name is not None and k is not None:
        text[name] = k
    return config, trained


def _stored_tensors(checkpoint: Checkpoint, stored: Mapping[str, mx.array]) -> dict[int, TensorInfo]:
    """Return the tensors whose lazy arrays have the bytes of the file, by the arrays' identity."""
    found = {id(value): (checkpoint.dense[name], value) for name, value in stored.items() if name in checkpoint.dense}
    return {
        key: info
        for key, (info, value) in found.items()
        if info.shape == value.shape and info.dtype in MLX_DTYPES and MLX_DTYPES[info.dtype] == value.dtype
    }


def _lazy_experts(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Return the routed experts' tensors, never evaluated: mlx-lm's sanitize may depend on their names."""
    if checkpoint.manifest:
        return {
            f"{layer.module}.{part.name}": mx.zeros((layer.num_experts, *part.shape), MLX_DTYPES[part.dtype])
            for layer in checkpoint.manifest.layers.values()
            for part in layer.layout.parts
            if part.part in (*AFFINE.parts, "bias")  # not other tools' names, which sanitize may know too
        }
    experts: dict[str, mx.array] = {}
    if not checkpoint.is_streamable:  # their names would be taken for others
        return experts
    for path in checkpoint.expert_files:
        experts |= {name: value for name, value in mx.load(str(path)).items() if parse_name(name)}
    return experts


def _build(config: dict[str, Any], checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """Return mlx-lm's model for a config, with its class extended by StreamingModel and lazy parameters."""
    model_class, args_class = find_classes(checkpoint, config, trust_remote_code)
    check_arguments(checkpoint, config, args_class)
    with ForeignCode(lambda error: refuse(config, args_class, error)):
        arguments = args_class.from_dict(config)
        return type(f"Streaming{model_class.__name__}", (StreamingModel, model_class), {})(arguments)


def _swap_experts(model: Any, checkpoint: Checkpoint) -> dict[str, StreamingSwitchGLU]:
    """Replace every SwitchGLU and SwitchMLP by a StreamingSwitchGLU, and return the new modules by path."""
    where = f"{checkpoint.config.get('model_type')}"
    swapped: dict[int, StreamingSwitchGLU] = {}
    paths: dict[str, StreamingSwitchGLU] = {}
    for path, module in model.named_modules():
        if not isinstance(module, SwitchGLU | SwitchMLP):
            continue
        if set(module.children()) - _PARTS.get(type(module), set()):
            raise UnsupportedModelError(
                f"[{where}] experts must be a plain SwitchGLU or SwitchMLP, got {path}. Run it in mlx-lm."
            )
        match = _LAYER.search(f"{path}.")
        layer = int(match.group(1)) if match else -1
        if layer < 0 or layer in swapped:
            raise UnsupportedModelError(f"[{where}] must have one SwitchGLU a layer, got {path}. Run it in mlx-lm.")
        gated = isinstance(module, SwitchGLU)
        if layer in checkpoint.moe_layers and checkpoint.layout(layer).has_gate != gated:
            raise MissingTensorError(
                f"[{where}] experts of layer {layer} must have {'a' if gated else 'no'} gate projection, as mlx-lm's "
                f"{type(module).__name__}, got {' and '.join(checkpoint.layout(layer).projections)}. Download it again."
            )
        activation = module.activation if gated else WithoutGate(module.activation)
        swapped[layer] = paths[path] = StreamingSwitchGLU(layer, activation)
        parent = model
        *parents, name = path.split(".")
        for part in parents:
            parent = parent[int(part)] if isinstance(parent, list) else getattr(parent, part)
        setattr(parent, name, swapped[layer])
    if sorted(swapped) != list(checkpoint.moe_layers):
        raise UnsupportedModelError(
            f"[{where}] mlx-lm's model must have a SwitchGLU in the layers {list(checkpoint.moe_layers)} that have "
            f"routed experts, got {sorted(swapped)}. Its experts can't be streamed: run it in mlx-lm."
        )
    return paths


def _quantize(model: Any, weights: Mapping[str, mx.array], checkpoint: Checkpoint) -> None:
    """Replace every module that has scales by its quantised form, as mlx-lm's own loading does."""

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        try:
            quantization = checkpoint.quantization(path)
        except MissingTensorError:  # sanitize gave it another name
            quantization = None
        if quantization is None:
            return infer_quant_config(path, module, weights)
        return mlx_arguments(quantization)

    nn.quantize(model, class_predicate=predicate)


def _cache_growth(model: Any, dtype: mx.Dtype, where: str) -> list[CacheGrowth]:
    """Return how each cache of one sequence grows, from dry runs in which nothing is evaluated."""
    runs = []
    for tokens in (2, 2 + CACHE_STEP):  # for a single token, a rotating cache would allocate ahead
        with ForeignCode(lambda error: _refuse_run(where, error)):
            caches = make_prompt_cache(model)
            super(StreamingModel, model).__call__(mx.zeros((1, tokens), mx.int32), cache=caches)
        runs.append([leaf for cache in caches for leaf in _leaves(cache)])
    for cache in runs[1]:
        window = getattr(cache, "max_size", None)
        if window is not None and (type(window) is not int or window < 1):
            raise CorruptError(
                f"[config.json] a cache's window must be a positive number of tokens, got {brief(window)}. "
                "Restore the file."
            )
    return [
        CacheGrowth(max(short.nbytes - step, 0), step * dtype.size // mx.float32.size, getattr(long, "max_size", None))
        for short, long in zip(*runs, strict=True)
        for step in (long.nbytes - short.nbytes,)
    ]


def _refuse_run(where: str, error: BaseException) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"[{where}] mlx-lm's model must run with its experts replaced, got {say(error)}. Run it in mlx-lm."
    )


def _leaves(cache: Any) -> Iterator[Any]:
    if isinstance(cache, CacheList):
        for part in cache.caches:
            yield from _leaves(part)
    else:
        yield cache

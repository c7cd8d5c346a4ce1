"""Any mlx-lm model whose experts are a SwitchGLU: mlx-lm's own model, with that module streaming its experts.

Routers, shared experts, scoring and caches stay mlx-lm's. There is no line per model here: layers are found by
type, K and the size of the caches by a dry run, in which nothing is evaluated.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU
from mlx_lm.utils import _get_classes

from ..checkpoint import Checkpoint
from ..config import StreamingConfig
from ..errors import CorruptError, MissingTensorError, RequestError, UnsupportedModelError
from ..moe import LAZY_ROWS, RoutedExperts
from ..ops.backend import backend
from ..streaming import StreamingEngine
from .caches import context_length
from .family import Family, convert, dense_bytes, load_bytes

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FLOAT32 = 4
_CACHE_STEP = 256  # tokens by which mlx_lm's caches grow
_MARGIN = 32 << 20


class StreamingSwitchGLU(nn.Module):
    """In place of mlx-lm's SwitchGLU. Before an engine is attached it returns zeros and notes K: the dry run."""

    routed: RoutedExperts | None

    def __init__(self, layer: int, activation: Callable[[mx.array, mx.array], mx.array]):
        super().__init__()
        self.layer = layer
        self.activation = activation
        self.routed = None
        self.num_experts_per_tok = 0

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Outputs of each token's experts: x (..., H) and indices (..., K) to (..., K, H), in the dtype of x."""
        shape = (*indices.shape, x.shape[-1])
        if self.routed is None:
            self.num_experts_per_tok = indices.shape[-1]
            return mx.zeros(shape, x.dtype)
        ids = np.array(indices.reshape(-1, indices.shape[-1]))
        return self.routed(x.reshape(-1, x.shape[-1]), ids).astype(x.dtype).reshape(shape)


class StreamingModel:
    """Mixed into mlx-lm's model class: runs each forward pass under the engine.

    Attributes:
        streaming: The running engine; set by ``attach``.
    """

    streaming: StreamingEngine

    def attach(self, engine: StreamingEngine) -> None:
        """Make ``engine`` the source of every layer's routed experts."""
        self.streaming = engine
        for _, module in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(module, StreamingSwitchGLU):
                # A subclass may compute something else.
                activation = None if type(module.activation) is SwiGLU else module.activation
                module.routed = RoutedExperts(engine, module.layer, engine.hidden_size(module.layer), activation)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        logits_to_keep: int | None = None,
    ) -> mx.array:
        """Logits, shape (B, L or logits_to_keep, vocabulary); see :class:`HybridModel`."""
        cache = make_prompt_cache(self) if cache is None else cache
        extra = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
        batch, tokens = (inputs if input_embeddings is None else input_embeddings).shape[:2]
        with self.streaming.forward_pass(batch, tokens, tokens + context_length(cache)):
            logits = super().__call__(inputs, cache=cache, **extra)  # type: ignore[misc]
        return logits if logits_to_keep is None else logits[:, -logits_to_keep:]


@dataclass(frozen=True)
class SwitchGLUCosts:
    """ModelCosts of a model that is known by its parameters and caches alone.

    Scratch is a generous estimate: mlx-lm's attention is not cut into blocks, so on the CPU all scores count.

    Attributes:
        dense_bytes: Weights kept in memory.
        load_bytes: Most that loading one tensor needs beyond them.
        fixed_state_bytes: Caches of a sequence that do not grow with it.
        step_bytes: Growth of the caches of a sequence every 256 tokens.
        widths: Hidden size, widest dense projection, expert width, vocabulary, experts, K, attention heads.
    """

    dense_bytes: int
    load_bytes: int
    fixed_state_bytes: int
    step_bytes: int
    hidden_size: int
    widest: int
    expert_width: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int
    score_heads: int

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * (self.fixed_state_bytes + -(-length // _CACHE_STEP) * self.step_bytes)

    def scratch_bytes(self, batch: int, tokens: int, length: int) -> int:
        rows = batch * tokens
        routed = rows * self.num_experts_per_tok * self.hidden_size * 2
        routing = 8 * rows * self.num_experts
        dense = rows * (8 * self.widest + 8 * self.hidden_size)
        lazy = min(rows * self.num_experts_per_tok, LAZY_ROWS + rows) * (3 * self.expert_width + 3 * self.hidden_size)
        expert = 2 * self.expert_width * self.hidden_size
        scores = 3 * batch * self.score_heads * tokens * length
        logits = 4 * batch * self.vocab_size
        return _FLOAT32 * (max(routed + lazy + expert, scores) + routing + dense + logits) + _MARGIN


def prepare(
    checkpoint: Checkpoint, stored: Mapping[str, mx.array], streaming: StreamingConfig, dtype: mx.Dtype
) -> Family:
    """What loading needs to know of an mlx-lm model with streamed experts. No weight is read.

    Args:
        checkpoint: Opened.
        stored: Its dense tensors, lazy, by stored name.
        streaming: load's arguments.
        dtype: Of activations where the CPU computes; a GPU keeps the checkpoint's own dtypes.

    Raises:
        UnsupportedModelError: If mlx-lm does not know the model type, or its experts are not a SwitchGLU.
        CorruptError: If config.json does not describe the checkpoint.
        RequestError: If num_experts_per_tok can't be had.
    """
    config = dict(checkpoint.config)
    k = streaming.num_experts_per_tok
    model = _build(config if k is None else config | {"num_experts_per_tok": k})
    layers = _swap_experts(model, checkpoint)
    weights = dict(model.sanitize(dict(stored)) if hasattr(model, "sanitize") else stored)
    _quantize(model, weights, checkpoint)
    if backend() == "cpu":
        weights = convert(weights, lambda _, v: dtype if mx.issubdtype(v.dtype, mx.floating) else v.dtype)
    fixed, step = _cache_bytes(model, dtype)
    found = {module.num_experts_per_tok for module in layers}
    if k is not None and found != {k}:
        raise RequestError(f"[num_experts_per_tok] can't be changed for {config['model_type']}, got {k}. Leave it out.")
    trained = config.get("num_experts_per_tok")
    lossy = k is not None and k != trained
    layout = checkpoint.layout(checkpoint.moe_layers[0])
    vocab = max((v.shape[0] for name, v in weights.items() if "embed" in name and v.ndim == 2), default=0)
    costs = SwitchGLUCosts(
        dense_bytes=dense_bytes(weights),
        load_bytes=load_bytes(stored),
        fixed_state_bytes=fixed,
        step_bytes=step,
        hidden_size=layout.hidden_size,
        widest=max((v.shape[0] for v in weights.values() if v.ndim == 2 and v.shape[0] != vocab), default=0),
        expert_width=layout.intermediate_size,
        vocab_size=vocab,
        num_experts=max(checkpoint.num_experts(layer) for layer in checkpoint.moe_layers),
        num_experts_per_tok=max(found),
        score_heads=int(config.get("num_attention_heads", 1)) if backend() == "cpu" else 0,
    )
    note = f"num_experts_per_tok={k} where the model was trained with {trained}"
    return Family(model, weights, costs, max(found), (note,) if lossy else ())


def _build(config: dict[str, Any]) -> Any:
    """mlx-lm's model for a config, its class extended by StreamingModel, parameters lazy."""
    try:
        # mlx-lm keeps its table of model types behind this name only; the minor version is pinned.
        model_class, args_class = _get_classes(config)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"[config.json] model_type must be one that mlx-lm knows, got {config.get('model_type')!r}. "
            "Check for a newer mlx-lm."
        ) from error
    try:
        args = args_class.from_dict(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CorruptError(
            f"[config.json] must describe a {config['model_type']} model, got {error}. Restore the file."
        ) from error
    return type(f"Streaming{model_class.__name__}", (StreamingModel, model_class), {})(args)


def _swap_experts(model: Any, checkpoint: Checkpoint) -> list[StreamingSwitchGLU]:
    """Put a StreamingSwitchGLU in the place of every SwitchGLU."""
    where = f"{checkpoint.config.get('model_type')}"
    swapped: dict[int, StreamingSwitchGLU] = {}
    for path, module in model.named_modules():
        if not isinstance(module, SwitchGLU):
            continue
        match = _LAYER.search(f"{path}.")
        layer = int(match.group(1)) if match else -1
        if layer < 0 or layer in swapped:
            raise UnsupportedModelError(f"[{where}] must have one SwitchGLU a layer, got {path}. It is not served.")
        swapped[layer] = StreamingSwitchGLU(layer, module.activation)
        parent = model
        *parents, name = path.split(".")
        for part in parents:
            parent = parent[int(part)] if isinstance(parent, list) else getattr(parent, part)
        setattr(parent, name, swapped[layer])
    if sorted(swapped) != list(checkpoint.moe_layers):
        raise UnsupportedModelError(
            f"[{where}] mlx-lm's model must have a SwitchGLU in the layers {checkpoint.moe_layers} that have routed "
            f"experts, got {sorted(swapped)}. Its experts can't be streamed."
        )
    return list(swapped.values())


def _quantize(model: Any, weights: Mapping[str, mx.array], checkpoint: Checkpoint) -> None:
    """Give quantised modules to every path that has scales, as mlx-lm's own loading does."""

    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        try:
            quantization = checkpoint.quantization(path)
        except MissingTensorError:  # sanitize gave it another name
            quantization = None
        if quantization is None:
            inputs = module.weight.shape[-1]
            return {
                "group_size": inputs // weights[f"{path}.scales"].shape[-1],
                "bits": weights[f"{path}.weight"].shape[-1] * 32 // inputs,
            }
        return {"group_size": quantization.group_size, "bits": quantization.bits}

    nn.quantize(model, class_predicate=predicate)


def _cache_bytes(model: Any, dtype: mx.Dtype) -> tuple[int, int]:
    """Bytes of one sequence's caches that stay and that grow every 256 tokens, from dry runs of 1 and 257."""
    sizes = []
    for tokens in (1, _CACHE_STEP + 1):
        cache = make_prompt_cache(model)
        super(StreamingModel, model).__call__(mx.zeros((1, tokens), mx.int32), cache=cache)
        sizes.append(sum(c.nbytes for c in cache) * dtype.size // _FLOAT32)
    step = sizes[1] - sizes[0]
    return max(sizes[0] - step, 0), step

"""load(): from a path or a repository to a model that streams its experts, under a memory limit from the first byte."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS
from mlx_lm.utils import load_config as load_mlx_lm_config

from .budget import LayerExperts, divide
from .checkpoint import Checkpoint
from .config import ModelConfig, StreamingConfig
from .errors import CheckpointError, CorruptError, MissingTensorError, RequestError, UnsupportedModelError
from .machine import default_memory_limit_bytes
from .models.costs import HybridCosts
from .models.qwen3_5_moe import Model, sanitize
from .ops.backend import backend
from .quantization import mlx_name
from .record import DTYPE_BYTES, Quantization
from .store import ExpertStore
from .streaming import StreamingEngine

logger = logging.getLogger(__name__)

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")

_FLOAT_DTYPES = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
_SMALL_BUFFER_CACHE = 4 << 20


def load(
    path_or_repo: str | Path,
    *,
    memory_limit: int | str | None = None,
    max_context: int = 8192,
    num_experts_per_tok: int | None = None,
    io: str = "auto",
    revision: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    return_config: bool = False,
) -> tuple[Model, TokenizerWrapper] | tuple[Model, TokenizerWrapper, dict[str, Any]]:
    """Load a model whose routed experts are streamed from disk, and its tokenizer.

    Args:
        path_or_repo: Local directory, or a repository on the Hugging Face hub.
        memory_limit: Bytes, or a text such as "8GB" or "8GiB": bounds dense weights, expert slots, KV cache
            at ``max_context`` and scratch. None takes a safe share of this machine.
        max_context: Tokens of prompt and answer that there must be room for.
        num_experts_per_tok: Overrides the router's K. Fewer than the model's own is faster and lossy.
        io: How expert bytes are read: "auto", "mmap", "pread" or "direct".
        revision: Branch, tag or commit of the repository.
        tokenizer_config: Passed to the tokenizer.
        return_config: Return config.json's contents too.

    Returns:
        (model, tokenizer), or (model, tokenizer, config).

    Raises:
        CheckpointError: If the files can't be used; subclasses say why.
        MemoryLimitError: If the limit can't hold; raised before weights are read, names the smallest that works.
        RequestError: If an argument is not usable.
    """
    streaming = StreamingConfig.from_arguments(memory_limit, max_context, num_experts_per_tok, io)
    prepared = _prepare(_resolve(path_or_repo, revision), streaming)
    config = load_mlx_lm_config(prepared.checkpoint.directory)
    tokenizer = _load_tokenizer(prepared.checkpoint.directory, config, tokenizer_config)
    model = prepared.load()
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def load_model(
    path: str | Path,
    *,
    memory_limit: int | str | None = None,
    max_context: int = 8192,
    num_experts_per_tok: int | None = None,
    io: str = "auto",
    revision: str | None = None,
) -> Model:
    """Load a model without its tokenizer. Arguments and errors as :func:`load`."""
    streaming = StreamingConfig.from_arguments(memory_limit, max_context, num_experts_per_tok, io)
    return _prepare(_resolve(path, revision), streaming).load()


def _resolve(path_or_repo: str | Path, revision: str | None) -> Path:
    path = Path(path_or_repo).expanduser()
    if path.exists():
        return path
    name = str(path_or_repo)
    if isinstance(path_or_repo, Path) or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"[load] {name} must be a directory or a hub repository, got neither. Check the path.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    # OSError covers the network's own errors and "not in the local cache".
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"[load] {name} must be a local directory or a repository that the hub serves, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]} Check name and network, or pass a local path."
        ) from error


def _load_tokenizer(directory: Path, config: Mapping[str, Any], extra: dict[str, Any] | None) -> TokenizerWrapper:
    text = config.get("text_config") or {}
    eos = config.get("eos_token_id") or text.get("eos_token_id")
    try:
        return load_tokenizer(directory, extra, eos_token_ids=eos)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"[{directory}] must hold a tokenizer that transformers can load, got {type(error).__name__}: "
            f"{str(error).splitlines()[0]} Download the tokenizer files, or use load_model."
        ) from error


@dataclass(frozen=True)
class _Prepared:
    """A checkpoint whose headers, dimensions and budget were found good; no weight was read."""

    checkpoint: Checkpoint
    config: ModelConfig
    streaming: StreamingConfig
    limit_bytes: int
    costs: HybridCosts
    model: Model
    store: ExpertStore
    names: Mapping[str, str]
    lossy: tuple[str, ...]

    def load(self) -> Model:
        layers = self.checkpoint.moe_layers
        try:
            # Freed buffers would pile up behind the limit's back while tensors are converted.
            mx.set_cache_limit(min(mx.set_cache_limit(_SMALL_BUFFER_CACHE), _SMALL_BUFFER_CACHE))
            self._load_dense()
            engine = StreamingEngine(
                self.store,
                {layer: self.checkpoint.layout(layer) for layer in layers},
                {layer: self.checkpoint.num_experts(layer) for layer in layers},
                self.costs,
                self.streaming,
                self.limit_bytes,
                self.config.num_experts_per_tok,
                self.lossy,
            )
        except BaseException:
            self.store.close()
            raise
        self.model.attach(engine)
        self.model.eval()
        return self.model

    def _load_dense(self) -> None:
        """Read the dense tensors, one at a time, into their dtypes. Expert tensors are never evaluated."""
        tensors = self.checkpoint.dense
        by_file: dict[Path, list[str]] = {}
        for name in self.names:
            by_file.setdefault(tensors[name].path, []).append(name)
        hub_layout = _has_hub_layout(self.checkpoint)
        expected = dict(tree_flatten(self.model.parameters()))
        for path, names in sorted(by_file.items()):
            lazy = mx.load(str(path))
            for name in names:
                canonical = self.names[name]
                value = sanitize({canonical: lazy.pop(name)}, self.config, hub_layout)[canonical]
                value = value.astype(self._dtype(name, value.dtype))
                if value.shape != expected[canonical].shape:
                    raise CorruptError(
                        f"[{path.name}] {name} must have shape {expected[canonical].shape}, got {value.shape}."
                    )
                mx.eval(value)
                self.model.load_weights([(canonical, value)], strict=False)

    def _dtype(self, name: str, stored: mx.Dtype) -> mx.Dtype:
        return _loaded_dtype(name, stored, self.model.dtype)


def _loaded_dtype(name: str, stored: mx.Dtype, activations: mx.Dtype) -> mx.Dtype:
    """dtype in which a dense tensor is kept: the activations', but quantised parts and A_log as they are."""
    if name.endswith((".scales", ".biases", "A_log")) or not mx.issubdtype(stored, mx.floating):
        return mx.float32 if name.endswith("A_log") else stored
    return activations


def _has_hub_layout(checkpoint: Checkpoint) -> bool:
    """Whether dense tensors are as the hub stores them; mlx_lm tells by the convolution's layout too."""
    for name, info in checkpoint.dense.items():
        if name.endswith("conv1d.weight"):
            return info.shape[-1] != 1
    return checkpoint.format.startswith("hf")


def _prepare(directory: Path, streaming: StreamingConfig) -> _Prepared:
    checkpoint = Checkpoint.open(directory)
    model_type = checkpoint.config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"[config.json] model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}. "
            "If the model fits in memory, mlx-lm may serve it."
        )
    config, lossy = _with_experts_per_tok(ModelConfig.from_dict(checkpoint.config), streaming.num_experts_per_tok)
    names = {name: mlx_name(name) for name in checkpoint.dense}
    if config.tie_word_embeddings:
        names = {name: canonical for name, canonical in names.items() if canonical != "language_model.lm_head.weight"}
    stored_modules = {canonical.rpartition(".")[0]: name.rpartition(".")[0] for name, canonical in names.items()}

    def quantization_of(path: str) -> Quantization | None:
        return checkpoint.quantization(stored_modules.get(path, path))

    dtype = _activation_dtype(checkpoint)
    model = Model(config, quantization_of, dtype)
    _check_names(model, names, directory)
    costs = _costs(checkpoint, config, names, dtype)
    limit_bytes = streaming.memory_limit_bytes
    if limit_bytes is None:
        limit_bytes = default_memory_limit_bytes(mx.device_info().get("max_recommended_working_set_size"))
    store = ExpertStore(checkpoint, io="pread" if streaming.io == "auto" else streaming.io)
    try:
        divide(
            limit_bytes,
            costs,
            {
                layer: LayerExperts(checkpoint.layout(layer).record_bytes, checkpoint.num_experts(layer))
                for layer in checkpoint.moe_layers
            },
            min_slots=config.num_experts_per_tok,
            batch=1,
            tokens=streaming.prefill_step_size,
            length=streaming.max_context,
            io_buffer_bytes=store.buffer_bytes,
        )
    except BaseException:
        store.close()
        raise
    return _Prepared(checkpoint, config, streaming, limit_bytes, costs, model, store, names, lossy)


def _with_experts_per_tok(config: ModelConfig, k: int | None) -> tuple[ModelConfig, tuple[str, ...]]:
    if k is None or k == config.num_experts_per_tok:
        return config, ()
    if k > config.num_experts:
        raise RequestError(
            f"[num_experts_per_tok] must be at most {config.num_experts}, the experts of a layer, got {k}."
        )
    return replace(config, num_experts_per_tok=k), (
        f"num_experts_per_tok={k} where the model was trained with {config.num_experts_per_tok}",
    )


def _activation_dtype(checkpoint: Checkpoint) -> mx.Dtype:
    """float32 on the CPU, where MLX accumulates bfloat16 in bfloat16; else the checkpoint's own."""
    if backend() == "cpu":
        return mx.float32
    for name, info in checkpoint.dense.items():
        if name.endswith("input_layernorm.weight"):
            return _FLOAT_DTYPES.get(info.dtype, mx.float32)
    return mx.float32


def _check_names(model: Model, names: Mapping[str, str], directory: Path) -> None:
    expected = {name for name, _ in tree_flatten(model.parameters())}
    present = set(names.values())
    if missing := sorted(expected - present):
        raise MissingTensorError(
            f"[{directory.name}] must have {missing[0]} and {len(missing) - 1} more tensors, got neither. "
            "Download the checkpoint again."
        )
    if unknown := sorted(present - expected):
        raise UnsupportedModelError(
            f"[{directory.name}] must have only tensors that the model knows, got {unknown[0]} and "
            f"{len(unknown) - 1} more. The checkpoint is of another architecture than config.json says."
        )


def _costs(checkpoint: Checkpoint, config: ModelConfig, names: Mapping[str, str], dtype: mx.Dtype) -> HybridCosts:
    dense, load, matvec = 0, 0, 0
    for name in names:
        info = checkpoint.dense[name]
        stored = _FLOAT_DTYPES.get(info.dtype, mx.uint32)
        kept = prod(info.shape) * _loaded_dtype(name, stored, dtype).size
        dense += kept
        load = max(load, info.nbytes + kept if stored != _loaded_dtype(name, stored, dtype) else 0)
        if name.endswith(".scales"):
            matvec = max(matvec, 2 * prod(info.shape) * mx.float32.size)
    expert = 0
    for layer in checkpoint.moe_layers:
        for part in checkpoint.layout(layer).parts:
            quantization = checkpoint.layout(layer).quantization(part.projection)
            values = prod(part.shape) * (32 // quantization.bits if part.dtype == "U32" and quantization else 1)
            expert = max(expert, 2 * values * DTYPE_BYTES["F32"])
    return HybridCosts(dense, load, config, dtype.size, matvec, expert)

"""load(): turn a path or repository into a model that streams its experts, within a memory limit from the start."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import StreamingConfig
from ..errors import (
    CheckpointError,
    MemoryLimitError,
    RequestError,
    StoreError,
)
from ..experts.buffer_cache import BufferCacheShare
from ..experts.distributed import Share
from ..experts.engine import StreamingEngine
from ..experts.memory_plan import MemoryDemand, MemoryPlan
from ..experts.ranks import DEFAULT_TIMEOUT, RankGroup
from ..forks import begin_use
from ..formats.checkpoint import Checkpoint
from ..formats.config_files import end_tokens, sampling_defaults
from ..formats.foreign import ForeignCode, say
from ..formats.hub_headers import HTTPError
from ..formats.places import local_directory
from ..installation import install_command
from ..machine import (
    PROCESS_OVERHEAD_BYTES,
    SAFE_SHARE,
    default_memory_limit_bytes,
    explain_default_memory_limit,
    usable_memory_bytes,
)
from ..models.foreign_dense import WORKSPACE, check_loadable, dequantised
from ..models.registry import build_spec
from ..models.spec import ModelSpec, check_tensors
from ..models.warm_up import KernelWarmUp, compiling
from ..ops.backend import backend, use_cpu_kernels, use_kernels
from ..ops.gpu import cuda_runtime
from ..ops.gpu.cuda_slots import MappedMemory, PinnedMemory
from ..ops.slot_memory import SlotMemory, UnifiedMemory
from ..packing.verification import check_other_files
from ..progress import Report, report, showing
from ..stats import format_bytes
from ..storage.store import ExpertStore
from ..system import raise_file_limit, recommended_working_set_bytes, return_freed_buffers
from .adapters import Adapter, check_alone
from .downloads import PATTERNS
from .model_type import StreamingModel
from .sharding import loading_together, own_directory, share_experts
from .tokenizer_files import load_checked_tokenizer

logger = logging.getLogger(__name__)

_SMALL_BUFFER_CACHE = 4 << 20


@overload
def load(
    path_or_repo: str | Path,
    *,
    memory_limit: int | str | None = ...,
    gpu_memory_limit: int | str | None = ...,
    max_context: int = ...,
    num_experts_per_tok: int | None = ...,
    io: str = ...,
    activation_bits: int | None = ...,
    verify: str | bool = ...,
    revision: str | None = ...,
    tokenizer_config: dict[str, Any] | None = ...,
    adapter_path: str | Path | None = ...,
    return_config: Literal[False] = ...,
    trust_remote_code: bool = ...,
    shard: bool | str | Path | None = ...,
    rank_timeout: float = ...,
    progress: bool | Report = ...,
) -> tuple[StreamingModel, TokenizerWrapper]: ...


@overload
def load(
    path_or_repo: str | Path,
    *,
    memory_limit: int | str | None = ...,
    gpu_memory_limit: int | str | None = ...,
    max_context: int = ...,
    num_experts_per_tok: int | None = ...,
    io: str = ...,
    activation_bits: int | None = ...,
    verify: str | bool = ...,
    revision: str | None = ...,
    tokenizer_config: dict[str, Any] | None = ...,
    adapter_path: str | Path | None = ...,
    return_config: Literal[True],
    trust_remote_code: bool = ...,
    shard: bool | str | Path | None = ...,
    rank_timeout: float = ...,
    progress: bool | Report = ...,
) -> tuple[StreamingModel, TokenizerWrapper, dict[str, Any]]: ...


def load(
    path_or_repo: str | Path,
    *,
    memory_limit: int | str | None = None,
    gpu_memory_limit: int | str | None = None,
    max_context: int = 8192,
    num_experts_per_tok: int | None = None,
    io: str = "auto",
    activation_bits: int | None = None,
    verify: str | bool = "sample",
    revision: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    return_config: bool = False,
    trust_remote_code: bool = False,
    shard: bool | str | Path | None = None,
    rank_timeout: float = DEFAULT_TIMEOUT,
    progress: bool | Report = True,
) -> tuple[StreamingModel, TokenizerWrapper] | tuple[StreamingModel, TokenizerWrapper, dict[str, Any]]:
    """Load a model whose routed experts are streamed from disk, and its tokenizer.

    Args:
        path_or_repo: Local directory, or a repository on the Hugging Face hub.
        memory_limit: Bytes, or a text such as "8GB" or "8GiB". Bounds dense weights, expert slots, the KV cache at
            ``max_context`` and scratch memory. None takes a safe share of this machine's memory. If a GPU has its own
            memory (CUDA), this bounds the host's: pinned files or buffers, and I/O buffers.
        gpu_memory_limit: Limit on a GPU's own memory: dense weights, expert slots, KV cache and scratch. None takes a
            safe share of it. Refused on Apple's chips and CPUs, which have a single memory.
        max_context: Maximum number of tokens, prompt and answer together, that memory is reserved for.
        num_experts_per_tok: Override for the router's K. Fewer experts than the model's own K is faster and lossy.
        io: How to read experts: "mmap" or "pread" through the page cache, "direct" past it, or "auto", which chooses
            by how many of the experts the page cache could hold. ``model.streaming.stats()`` reports the choice.
        activation_bits: 8 rounds activations to 8 bits per group in CPU passes of one or two tokens, as llama.cpp
            does: faster and lossy (logits change by 1 to 2 %). None is exact.
        verify: Checksum policy for packed checkpoints: "full" checks every record that is read, and all other files
            before they are loaded; "sample" checks one record in 16, but none that a CUDA GPU fetches by itself; False
            none. Stock checkpoints have no checksums.
        revision: Branch, tag or commit of the repository.
        tokenizer_config: Options passed to the tokenizer.
        adapter_path: Directory of a LoRA adapter that ``mlx_lm.lora`` wrote, which changes no routed experts.
        return_config: Whether to return the contents of config.json too.
        trust_remote_code: Whether to run Python files that come with the checkpoint: its tokenizer's, and the model's
            own where config.json names a ``model_file``. Only for checkpoints whose code you have read or trust.
        shard: How the ranks that ``mlx.launch`` started share the experts. None divides them by number if there are
            several ranks, or as a checkpoint packed with ``shard`` says; a path names a plan file; False makes each
            rank load the whole model.
        rank_timeout: Seconds that a rank waits for another one before it gives up.
        progress: True shows what takes long: one line on a terminal's stderr, a bar in a notebook, nothing elsewhere.
            A function receives each `Progress`. False shows nothing.

    Returns:
        (model, tokenizer), or (model, tokenizer, config).

    Raises:
        CheckpointError: If the files can't be used; subclasses say why.
        DistributedError: If the ranks differ, or one fails or doesn't arrive in time.
        MemoryLimitError: If the limit is too small. Raised before weights are read; names the smallest that works.
        RequestError: If an argument is not usable.
        StoreError: If this process was forked from one that had computed: use multiprocessing's "spawn" method.
    """
    streaming = StreamingConfig.from_arguments(
        memory_limit, max_context, num_experts_per_tok, io, activation_bits, trust_remote_code, gpu_memory_limit
    )
    with showing(progress), loading_together(shard, rank_timeout) as ranks:
        prepared = _prepare(_resolve(path_or_repo, revision), streaming, verify, ranks, shard, adapter_path)
        with ExitStack() as undo:
            undo.callback(prepared.store.close)
            config = copy.deepcopy(dict(prepared.checkpoint.config))
            report("loading the tokenizer")
            eos = end_tokens(prepared.checkpoint.directory, config)
            tokenizer = load_checked_tokenizer(
                prepared.checkpoint.directory, eos, tokenizer_config, trust_remote_code=trust_remote_code
            )
            if eos is not None:
                config["eos_token_id"] = eos  # as in mlx_lm's load_config
            undo.pop_all()
        model = prepared.load()
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def load_model(
    path: str | Path,
    *,
    memory_limit: int | str | None = None,
    gpu_memory_limit: int | str | None = None,
    max_context: int = 8192,
    num_experts_per_tok: int | None = None,
    io: str = "auto",
    activation_bits: int | None = None,
    verify: str | bool = "sample",
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    trust_remote_code: bool = False,
    shard: bool | str | Path | None = None,
    rank_timeout: float = DEFAULT_TIMEOUT,
    progress: bool | Report = True,
) -> StreamingModel:
    """Load a model without its tokenizer. Takes the arguments of :func:`load` and raises the same errors."""
    streaming = StreamingConfig.from_arguments(
        memory_limit, max_context, num_experts_per_tok, io, activation_bits, trust_remote_code, gpu_memory_limit
    )
    with showing(progress), loading_together(shard, rank_timeout) as ranks:
        return _prepare(_resolve(path, revision), streaming, verify, ranks, shard, adapter_path).load()


def _resolve(path_or_repo: str | Path, revision: str | None) -> Path:
    if (directory := local_directory(path_or_repo, "load")) is not None:
        return directory
    name = str(path_or_repo)
    report("")  # the hub draws bars of its own
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    # OSError covers "not in the local cache".
    except (HTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"[load] {name} must be a local directory or a repository that the hub serves, got {say(error)}. "
            "Check name and network, or pass a local path."
        ) from error


@dataclass(frozen=True)
class _Prepared:
    """A checkpoint whose headers, dimensions and budget have been validated; no weights have been read."""

    checkpoint: Checkpoint
    spec: ModelSpec
    plan: MemoryPlan
    store: ExpertStore
    share: Share | None
    adapter: Adapter | None

    def load(self) -> Any:
        model = self.spec.model
        # Otherwise freed buffers would accumulate beyond the limit while tensors are converted.
        with ExitStack() as undo, BufferCacheShare(_SMALL_BUFFER_CACHE):
            undo.callback(self.store.close)
            self._load_dense()
            memory = slot_memory(self.store, self.plan)
            engine = StreamingEngine(self.store, self.plan, memory, self.spec.lossy, self.share)
            undo.pop_all()
        engine.sampling = sampling_defaults(self.checkpoint.directory)
        model.attach(engine)
        model.eval()
        return model

    def _load_dense(self) -> None:
        """Read and convert the dense tensors, and compile a GPU's kernels meanwhile."""
        if self.adapter is not None or not use_kernels():  # a GPU's steps are built around the modules they find
            self._load_weights(list(self.spec.weights))
            self._finish(self.spec.model.modules())
            if self.adapter is not None:
                self.adapter.apply(self.spec.model)
            self._prepare_steps()
            return
        layouts = {layer: self.checkpoint.layout(layer) for layer in self.checkpoint.moe_layers}
        warm_up = KernelWarmUp(self.spec.model, self.spec.weights, layouts, self.spec.num_experts_per_tok)
        self._load_weights(warm_up.first)
        self._finish(warm_up.modules())
        with compiling(warm_up.run):
            self._load_weights(warm_up.others)
        self._finish(self.spec.model.modules())
        self._prepare_steps()

    def _prepare_steps(self) -> None:
        if hasattr(self.spec.model, "prepare_steps"):
            self.spec.model.prepare_steps()

    def _load_weights(self, names: Sequence[str]) -> None:
        """Load dense tensors one at a time. Expert tensors are never evaluated."""
        done, total = 0, sum(self.spec.weights[name].nbytes for name in names)
        for name in names:
            value = self.spec.weights.pop(name)
            report("loading dense weights", done, total)
            done += value.nbytes
            with ForeignCode(partial(_unread, name)):
                mx.eval(value)
            self.spec.model.load_weights([(name, value)], strict=False)

    def _finish(self, modules: Iterable[Any]) -> None:
        """Evaluate arrays that modules created, such as rotary frequencies: other threads can't use lazy ones."""
        for module in modules:
            mx.eval([value for value in module.values() if isinstance(value, mx.array)])


def inspect_checkpoint(directory: Path, streaming: StreamingConfig) -> tuple[Checkpoint, ModelSpec]:
    """Validate a checkpoint by its headers and config.json, and build its model. No weights are read.

    Raises:
        CheckpointError: If the files can't be used.
        RequestError: If this model does not support one of load's arguments.
    """
    raise_file_limit()  # each lazy tensor keeps its shard open, and the store opens it again
    checkpoint = Checkpoint.open(directory)
    stored, replaced = dequantised(_lazy_dense(checkpoint), checkpoint.packing)
    spec = build_spec(checkpoint, stored, streaming, _activation_dtype(stored))
    if replaced:
        footprint: Any = spec.footprint  # a dataclass, one of two kinds
        spec = replace(spec, footprint=replace(footprint, load_bytes=WORKSPACE * footprint.load_bytes))
    check_tensors(spec, directory.name)
    return checkpoint, spec


def has_own_memory() -> bool:
    """Return whether slots are in a GPU's own memory, with its own limit: on CUDA, with cuda-bindings."""
    return backend() == "cuda" and cuda_runtime.is_available()


def default_gpu_memory_limit_bytes() -> int | None:
    """Return a safe share of a GPU's own memory, or None if there is a single memory."""
    return int(mx.device_info()["total_memory"] * SAFE_SHARE) if has_own_memory() else None


def choose_limits(streaming: StreamingConfig) -> tuple[int, int | None]:
    """Return the limit on the memory that holds the slots, and the host's limit if that is a GPU's own memory.

    Raises:
        MemoryLimitError: If no limit was requested and this process may use too little memory to choose one.
        RequestError: If a limit was requested for a memory that doesn't exist.
    """
    if has_own_memory():
        return streaming.gpu_memory_limit_bytes or default_gpu_memory_limit_bytes() or 0, _choose_limit(streaming)
    if streaming.gpu_memory_limit_bytes is not None:
        raise RequestError(
            "[gpu_memory_limit] must be left out if no GPU has memory of its own, got one: memory_limit bounds all "
            f"of it. On CUDA install cuda-bindings: {install_command('cuda13')}, or [cuda12]."
        )
    return _choose_limit(streaming), None


def _choose_limit(streaming: StreamingConfig) -> int:
    """Return the limit asked for, or a safe share of this machine.

    Raises:
        MemoryLimitError: If no limit was requested and this process may use too little memory to choose one.
    """
    if streaming.memory_limit_bytes is not None:
        return streaming.memory_limit_bytes
    if limit_bytes := default_memory_limit_bytes(*_device_memory()):
        return limit_bytes
    raise MemoryLimitError(
        f"[memory_limit] must be given if this process may only use {format_bytes(usable_memory_bytes())}, got "
        f"none: the interpreter and its libraries take up to {format_bytes(PROCESS_OVERHEAD_BYTES)}. Pass "
        "memory_limit, or give the process more memory."
    )


def slot_memory(store: ExpertStore, plan: MemoryPlan) -> SlotMemory:
    """Create the memory that experts are read into, as planned."""
    if plan.host is None:
        return UnifiedMemory(store)
    runtime = cuda_runtime.BoundRuntime()
    if plan.host.mapped_bytes:
        return MappedMemory(store, runtime)
    return PinnedMemory(store, runtime, plan.host.staging_records)


def plan_memory(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    streaming: StreamingConfig,
    limit_bytes: int,
    host_limit_bytes: int | None = None,
    own: Mapping[int, int] | None = None,
    *,
    probe: bool = True,
) -> MemoryPlan:
    """Plan how a limit is divided and how experts are read. No weights are read.

    Args:
        checkpoint: The checkpoint.
        spec: Its model.
        streaming: load's arguments.
        limit_bytes: The limit on the memory that holds the slots.
        host_limit_bytes: The limit on the host's memory, if that is a different one.
        own: Number of experts of each layer to read in this process; None for all.
        probe: Find the number of I/O threads by a short probe of the files where it isn't remembered.

    Raises:
        MemoryLimitError: If the limit is too small; names the smallest limit that works.
    """
    demand = MemoryDemand.of(checkpoint, spec.footprint, spec.num_experts_per_tok, streaming, own)
    if host_limit_bytes is None:
        return MemoryPlan.make(limit_bytes, demand, checkpoint, streaming.io, probe=probe)
    return MemoryPlan.make_for_gpu(limit_bytes, host_limit_bytes, demand, checkpoint, streaming.io, probe=probe)


def limit_reason() -> str:
    """Return a phrase that says where the limit comes from that `choose_limits` takes by default."""
    return explain_default_memory_limit(*_device_memory())


def _device_memory() -> tuple[int | None, int | None]:
    """Return Metal's recommended working set and a discrete GPU's memory, where MLX reports them."""
    total = mx.device_info().get("total_memory") if backend() == "cuda" and not has_own_memory() else None
    return recommended_working_set_bytes(), total


def _with_rounded_activations(spec: ModelSpec, bits: int) -> ModelSpec:
    if not (hasattr(spec.model, "activation_bits") and use_cpu_kernels()):
        raise RequestError(
            f"[activation_bits] must be left out if the CPU kernels don't decode, got {bits}. They decode "
            f"Qwen3.5-MoE and Qwen3-Next on the CPU, with numba: {install_command('cpu')}."
        )
    spec.model.activation_bits = bits
    return replace(spec, lossy=(*spec.lossy, f"{bits}-bit activations in decode"))


def _prepare(
    directory: Path,
    streaming: StreamingConfig,
    verify: str | bool,
    ranks: RankGroup | None = None,
    shard: bool | str | Path | None = None,
    adapter_path: str | Path | None = None,
) -> _Prepared:
    begin_use()
    check_alone(adapter_path, streaming.activation_bits, ranks)
    adapter = None if adapter_path is None else Adapter.open(adapter_path)
    report("reading headers")
    return_freed_buffers()
    directory = own_directory(directory, ranks)
    checkpoint, spec = inspect_checkpoint(directory, streaming)
    check_loadable(checkpoint)
    spec = spec if adapter is None else adapter.counted(spec)
    share = share_experts(ranks, checkpoint, streaming, shard)
    if streaming.activation_bits is not None:
        spec = _with_rounded_activations(spec, streaming.activation_bits)
    if verify == "full" and checkpoint.manifest:
        check_other_files(directory, checkpoint.manifest)
    limits = choose_limits(streaming)
    try:
        plan = plan_memory(checkpoint, spec, streaming, *limits, None if share is None else share.counts())
    except MemoryLimitError as error:
        if streaming.memory_limit_bytes is not None:
            raise
        message = f"{error} No limit was given: this one is {limit_reason()}."
        raise MemoryLimitError(message, error.smallest_limit_bytes) from None
    store = ExpertStore(checkpoint, io=plan.reads.io, num_threads=plan.reads.num_threads, verify=verify)
    return _Prepared(checkpoint, spec, plan, store, share, adapter)


def _lazy_dense(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """Return the dense tensors by stored name, lazily: MLX reads headers now, and each tensor when evaluated."""
    stored: dict[str, mx.array] = {}
    for path in sorted({info.path for info in checkpoint.dense.values()}):
        with ForeignCode(partial(_unread, path.name)):
            stored |= {name: value for name, value in mx.load(str(path)).items() if name in checkpoint.dense}
    return stored


def _unread(what: str, error: BaseException) -> StoreError:
    return StoreError(
        f"[load] {what} must be read whole, got {say(error)}. Check the disk, and the files with "
        '"flash-moe verify"; they must not change while they are loaded.'
    )


def _activation_dtype(stored: Mapping[str, mx.array]) -> mx.Dtype:
    """Return float32 on the CPU, where MLX accumulates bfloat16 in bfloat16; else the checkpoint's dtype."""
    if backend() == "cpu":
        return mx.float32
    return next((value.dtype for name, value in stored.items() if name.endswith("norm.weight")), mx.float32)

"""Prefix states in a directory, so that a long system prompt is read once and not once per process.

A file holds what mlx_lm's ``save_prompt_cache`` writes, with the prompt's tokens, a fingerprint of the model and a
checksum as metadata. It is written under another name and then renamed: a process that is killed leaves whole files.
Files that are damaged or belong to another model are ignored.
"""

import base64
import hashlib
import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from ..errors import FlashMoEError, RequestError
from ..experts.warming import hot_experts, warm
from ..formats.safetensors_header import read_bytes, read_metadata
from ..ops.backend import backend
from ..packing.sources import fingerprint
from ..stats import format_bytes

logger = logging.getLogger(__name__)

MIN_FILE_TOKENS = 512
"""Minimum number of tokens that a file saves. Writing one takes as long as computing a few, and wears the disk."""

_FORMAT = "flash-moe-prefix-1"
_UNUSABLE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, FlashMoEError)
"""Exceptions of reading or writing a file; mlx_lm's loader may raise any of Python's errors about values."""


@dataclass(frozen=True, eq=False)
class _File:
    path: Path
    tokens: np.ndarray
    nbytes: int


class PrefixFiles:
    """Files of a model's prefix states and hot experts, within a limit of bytes: the least recently used go first.

    Several processes may share a directory.
    """

    def __init__(self, model: Any, directory: str | Path, max_bytes: int):
        """Look through the directory, and create it if it doesn't exist.

        Args:
            model: The model that :func:`flash_moe_mlx.load` returned.
            directory: The directory. It holds prompts: only its owner may read one that is created here.
            max_bytes: Maximum total size of the files.

        Raises:
            RequestError: If it can't be a directory that is written to.
        """
        self._model, self._max_bytes = model, max_bytes
        self._directory = Path(directory).expanduser()
        self._lock = threading.Lock()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = sorted(self._directory.iterdir())
        except OSError as error:
            raise RequestError(f"[prefix directory] {directory} must be a directory, got {error}. Name one.") from error
        self._fingerprint = _model_fingerprint(model)
        self._classes = [type(cache).__name__ for cache in make_prompt_cache(model)]
        self._trimmable = can_trim_prompt_cache(make_prompt_cache(model))
        self._experts_path = self._directory / f"experts-{self._fingerprint}.json"
        self._files = [file for path in found if (file := self._looked_at(path)) is not None]

    def longest(self, tokens: np.ndarray) -> int:
        """Return how many of ``tokens`` the best file spares; the last one is always fed, to get logits."""
        return max((self._spares(file, tokens) for file in self._files), default=0)

    def load(self, tokens: np.ndarray) -> tuple[list[Any], int] | None:
        """Return caches of the longest stored prefix of ``tokens``, and its length; None if no file can be used."""
        while count := self.longest(tokens):
            with self._lock:
                file = max(self._files, key=lambda file: self._spares(file, tokens))
            try:
                caches = self._read(file)
                os.utime(file.path)
            except _UNUSABLE as error:
                _ignored(file.path, error)
                with self._lock:
                    self._files = [other for other in self._files if other is not file]
                continue
            if count < len(file.tokens):
                trim_prompt_cache(caches, len(file.tokens) - count)
            logger.info("%d tokens of a prompt from %s", count, file.path.name)
            return caches, count
        return None

    def save(self, tokens: np.ndarray, caches: Sequence[Any]) -> None:
        """Write caches that hold exactly ``tokens``, if that spares enough; a failure is a warning."""
        if len(tokens) - self.longest(np.append(tokens, 0)) < MIN_FILE_TOKENS:
            return
        name = hashlib.sha256(self._fingerprint.encode() + tokens.tobytes()).hexdigest()[:32]
        path = self._directory / f"prefix-{name}.safetensors"
        arrays = [value for _, value in tree_flatten([c.state for c in caches]) if isinstance(value, mx.array)]
        nbytes = sum(array.nbytes for array in arrays) + 8 * len(tokens)
        if nbytes > self._max_bytes:
            logger.info("no file of %d tokens: it has %s", len(tokens), format_bytes(nbytes))
            return
        temporary = self._directory / f".{name}.{os.getpid()}-{threading.get_ident()}.safetensors"
        metadata = {
            "format": _FORMAT,
            "fingerprint": self._fingerprint,
            "tokens": base64.b64encode(tokens.tobytes()).decode(),
            "checksum": str(_checksum(caches)),
        }
        try:
            self._evict(self._max_bytes - nbytes)
            if shutil.disk_usage(self._directory).free < 2 * nbytes:
                raise OSError("the disk has no room for it")
            save_prompt_cache(str(temporary), list(caches), metadata)
            os.replace(temporary, path)
            written = _File(path, tokens, path.stat().st_size)
        except _UNUSABLE as error:
            temporary.unlink(missing_ok=True)
            logger.warning("[prefix directory] %s was not written: %s", path.name, error)
            return
        with self._lock:
            self._files = [*(file for file in self._files if file.path != path), written]
        logger.info("%d tokens of a prompt to %s, %s", len(tokens), path.name, format_bytes(written.nbytes))

    def save_experts(self) -> None:
        """Note which experts are in memory; a failure is a warning."""
        temporary = self._experts_path.with_name(f".{self._experts_path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            temporary.write_text(json.dumps(hot_experts(self._model.streaming)))
            os.replace(temporary, self._experts_path)
        except _UNUSABLE as error:
            temporary.unlink(missing_ok=True)
            logger.warning("[prefix directory] %s was not written: %s", self._experts_path.name, error)

    def warm_experts(self) -> int:
        """Read the experts that were in memory when they were noted, as far as slots are free; returns their number."""
        try:
            if not self._experts_path.exists():
                return 0
            noted = json.loads(read_bytes(self._experts_path, "Remove it."))
            experts = {int(layer): [int(expert) for expert in listed] for layer, listed in noted.items()}
        except _UNUSABLE as error:
            _ignored(self._experts_path, error)
            return 0
        return warm(self._model.streaming, experts)

    def _spares(self, file: _File, tokens: np.ndarray) -> int:
        size = min(len(file.tokens), len(tokens) - 1)
        if size <= 0:
            return 0
        differing = np.flatnonzero(file.tokens[:size] != tokens[:size])
        common = int(differing[0]) if len(differing) else size
        return common if self._trimmable or common == len(file.tokens) else 0

    def _looked_at(self, path: Path) -> _File | None:
        """Return a usable file, judged by its metadata; remove what a process that no longer lives began to write."""
        if path.name.startswith("."):
            _remove_if_abandoned(path)
            return None
        if not (path.name.startswith("prefix-") and path.suffix == ".safetensors"):
            if path != self._experts_path and not path.name.startswith("experts-"):
                _ignored(path, ValueError("it was not written here"))
            return None
        try:
            metadata = read_metadata(path)
            if metadata.get("0.format") != _FORMAT:
                raise ValueError("it has another format")
            if metadata["0.fingerprint"] != self._fingerprint:
                return None  # of another model, which may use the directory as well
            tokens = np.frombuffer(base64.b64decode(metadata["0.tokens"], validate=True), np.uint32)
            return _File(path, tokens, path.stat().st_size)
        except _UNUSABLE as error:
            _ignored(path, error)
            return None

    def _read(self, file: _File) -> list[Any]:
        loaded, metadata = load_prompt_cache(str(file.path), return_metadata=True)
        if [type(cache).__name__ for cache in loaded] != self._classes:
            raise ValueError("its caches are of other kinds than the model's")
        mx.eval([cache.state for cache in loaded])
        if str(_checksum(loaded)) != metadata["checksum"]:
            raise ValueError("its checksum differs")
        caches = make_prompt_cache(self._model)  # of the model's own classes, which share mlx_lm's names
        for own, cache in zip(caches, loaded, strict=True):
            own.state = cache.state
        return caches

    def _evict(self, max_bytes: int) -> None:
        """Remove the least recently used files of any model until the others have at most ``max_bytes``."""
        found = [(path, path.stat()) for path in self._directory.glob("prefix-*.safetensors")]
        total = sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda pair: pair[1].st_mtime_ns):
            if total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= status.st_size
            with self._lock:
                self._files = [file for file in self._files if file.path != path]


def _model_fingerprint(model: Any) -> str:
    """Return a hash of everything that a model's states depend on."""
    engine = model.streaming
    with engine.between_passes() as (_, checkpoint):
        num_experts = sum(map(checkpoint.num_experts, checkpoint.moe_layers))
    if engine.stats().num_experts < num_experts:
        raise RequestError("[prefix directory] must be left out where ranks share the experts, got one. Leave it out.")
    paths = {checkpoint.directory / "config.json", *(info.path for info in checkpoint.tensors.values())}
    parts: list[Any] = [_FORMAT, mx.__version__, backend(), str(getattr(model, "dtype", ""))]
    parts += [getattr(model, "activation_bits", None), *engine.stats().lossy]
    parts += [f"{path.name} {fingerprint(path)}" for path in sorted(paths)]
    if (adapter := getattr(model, "adapter", None)) is not None:
        parts.append(adapter)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _checksum(caches: Sequence[Any]) -> int:
    total = 0
    for name, value in tree_flatten([cache.state for cache in caches]):
        described = f"{name} {value.dtype} {value.shape}" if isinstance(value, mx.array) else f"{name} {value!r}"
        total = zlib.crc32(described.encode(), total)
        if isinstance(value, mx.array) and value.size:
            flat = mx.contiguous(value).reshape(-1).view(mx.uint8)
            mx.eval(flat)
            total = zlib.crc32(memoryview(flat), total)
    return total


def _ignored(path: Path, error: BaseException) -> None:
    logger.warning("[prefix directory] %s is ignored: %s", path.name, error)


def _remove_if_abandoned(path: Path) -> None:
    """Remove a temporary file of a process that no longer runs."""
    try:
        os.kill(int(path.name.split(".")[-2 if path.suffix == ".safetensors" else -1].split("-")[0]), 0)
    except ProcessLookupError:
        path.unlink(missing_ok=True)
    except (ValueError, IndexError, OSError, OverflowError):
        return  # not ours to judge

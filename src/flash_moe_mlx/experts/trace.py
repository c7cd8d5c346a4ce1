"""Routing traces: which experts each token's router picked, recorded while a model runs.

The file is a numpy ``.npz`` with ``experts`` (tokens, layers, K), unsigned, whose largest value means "not recorded";
``weights``, float16 of the same shape, NaN for models of mlx-lm, which keep them to themselves; ``phase`` (tokens,),
uint8, 0 for prefill and 1 for decode; ``passes`` (passes,), the tokens of each forward pass; ``layers`` (layers,), the
model's layer numbers; and ``num_experts``. `RoutingTrace.read` also reads files without the last three.
"""

import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from ..errors import RequestError
from ..formats.foreign import ForeignCode, say

PREFILL, DECODE = 0, 1
NOT_RECORDED = -1
MAX_EXPERTS = 1 << 20

_ARRAYS = ("experts", "phase", "passes", "layers", "num_experts")
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class RoutingTrace:
    """The router's choices, token by token.

    Attributes:
        experts: Ids, shape (tokens, layers, K), signed; NOT_RECORDED where unknown.
        phase: PREFILL or DECODE of each token. Shape (tokens,).
        layers: The model's layer numbers.
        num_experts: Number of experts, E, of the largest layer.
        passes: Number of tokens in each forward pass, in order.
    """

    experts: np.ndarray
    phase: np.ndarray
    layers: tuple[int, ...]
    num_experts: int
    passes: np.ndarray

    @classmethod
    def read(cls, path: str | Path) -> "RoutingTrace":
        """Read a trace file.

        If it doesn't say which tokens ran together, each run of prefill tokens is one pass, as is each decoded token.

        Raises:
            RequestError: If the file is not a trace.
        """
        arrays = _read_arrays(Path(path))
        if absent := {"experts", "phase"} - arrays.keys():
            raise RequestError(f"[trace] {path} must hold experts and phase, got no {absent.pop()}. Record it again.")
        experts, phase = arrays["experts"], arrays["phase"]
        if experts.ndim != 3 or not _is_whole(experts) or phase.shape != experts.shape[:1] or not _is_whole(phase):
            raise RequestError(
                f"[trace] experts must be integers (tokens, layers, K), got {experts.dtype} {experts.shape} "
                f"and {phase.shape[0] if phase.ndim else 'no'} phases. Record it again."
            )
        unknown = experts == np.iinfo(experts.dtype).max if experts.dtype.kind == "u" else experts < 0
        highest = int(experts.max(initial=0, where=~unknown))
        layers = arrays.get("layers", np.arange(experts.shape[1]))
        passes = arrays.get("passes", _passes_of(phase))
        num_experts = arrays.get("num_experts", np.array(highest + 1))
        for what, good in (
            ("phases of 0 and 1", bool(((phase == PREFILL) | (phase == DECODE)).all())),
            (f"ids below {MAX_EXPERTS}", highest < MAX_EXPERTS),
            (
                f"{experts.shape[1]} different layer numbers",
                layers.shape == experts.shape[1:2] and _is_whole(layers) and len(set(layers.tolist())) == len(layers),
            ),
            (
                f"passes of {len(phase)} tokens",
                passes.ndim == 1 and _is_whole(passes) and min(passes.tolist(), default=1) > 0
                and sum(passes.tolist()) == len(phase),
            ),
            (
                f"num_experts from {highest + 1} to {MAX_EXPERTS}",
                num_experts.shape == () and _is_whole(num_experts) and highest < int(num_experts) <= MAX_EXPERTS,
            ),
        ):  # fmt: skip
            if not good:
                raise RequestError(f"[trace] {path} must have {what}, got others. Record it again.")
        experts = np.where(unknown, NOT_RECORDED, experts.astype(np.int32))
        return cls(experts, phase, tuple(layers.tolist()), int(num_experts), passes)

    def requests(self, column: int) -> Iterator[tuple[list[int], list[int], int, int]]:
        """Yield each pass's requests to the layer of a column: distinct experts, tokens per expert, tokens, phase.

        Passes with nothing recorded for that layer are left out.
        """
        start = 0
        for count in self.passes.tolist():
            ids = self.experts[start : start + count, column]
            phase = int(self.phase[start])
            start += count
            experts, counts = np.unique(ids[ids != NOT_RECORDED], return_counts=True)
            if len(experts):
                yield experts.tolist(), counts.tolist(), count, phase


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a trace file that are used. None is allocated before its size is known to be in the file.

    Raises:
        RequestError: If numpy did not write the file, or it is too large.
    """

    def refuse(got: object) -> RequestError:
        return RequestError(
            f"[trace] {path} must be a routing trace (.npz), got {got}. Record one with model.streaming.trace."
        )

    def unread(error: BaseException) -> RequestError:
        return refuse("no such file" if isinstance(error, FileNotFoundError) else say(error))

    with ForeignCode(unread):
        is_file = stat.S_ISREG(path.stat().st_mode)  # checked before opening, which would block on a pipe
    if not is_file:
        raise refuse("something that is no file")
    arrays = {}
    with ForeignCode(lambda error: refuse(say(error))), ZipFile(path) as archive:
        for name in {f"{name}.npy" for name in _ARRAYS} & set(archive.namelist()):
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            nbytes = prod(shape) * dtype.itemsize
            if (
                dtype.hasobject
                or min(shape, default=0) < 0
                or nbytes > min(archive.getinfo(name).file_size, _MAX_BYTES)
            ):
                raise refuse(f"{name} of {dtype} {shape}")
            with archive.open(name) as file:
                arrays[name.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _is_whole(array: np.ndarray) -> bool:
    return array.dtype.kind in "ui"


def _passes_of(phase: np.ndarray) -> np.ndarray:
    starts = [i for i in range(len(phase)) if phase[i] == DECODE or i == 0 or phase[i - 1] == DECODE]
    return np.diff([*starts, len(phase)])


class TraceRecorder:
    """Collects routing decisions and writes them on close. Use as a context manager."""

    def __init__(self, path: str | Path, layers: Sequence[int], num_experts: int):
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise RequestError(f"[trace] the directory {self.path.parent} must exist. Create it first.")
        self._column = {layer: i for i, layer in enumerate(layers)}
        self._num_experts = num_experts
        self._passes: list[tuple[int, int, dict[int, tuple[np.ndarray, np.ndarray]]]] = []
        self.closed = False

    def begin(self, tokens: int, phase: int) -> None:
        """Start a forward pass of ``tokens`` tokens."""
        self._passes.append((tokens, phase, {}))

    def record(self, layer: int, experts: np.ndarray, weights: np.ndarray) -> None:
        """Record one layer's choice for the pass's next tokens: ids and weights of shape (tokens, K)."""
        layers, scores = self._passes[-1][2], weights.astype(np.float16)
        if layer in layers:
            before = layers[layer]
            layers[layer] = np.concatenate([before[0], experts]), np.concatenate([before[1], scores])
        else:
            layers[layer] = experts.copy(), scores

    def close(self) -> None:
        """Write the file. Later calls do nothing.

        Raises:
            RequestError: If it can't be written; nothing is left of it.
        """
        if self.closed:
            return
        self.closed = True
        try:
            self._write()
        except OSError as error:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            raise RequestError(
                f"[trace] {self.path} must be writable, got {error}. Check the path and the disk's room."
            ) from error

    def _write(self) -> None:
        tokens = sum(count for count, _, _ in self._passes)
        k = max((ids.shape[1] for *_, layers in self._passes for ids, _ in layers.values()), default=0)
        dtype = np.uint8 if self._num_experts < 255 else np.uint16
        experts = np.full((tokens, len(self._column), k), np.iinfo(dtype).max, dtype)
        weights = np.zeros(experts.shape, np.float16)
        phase = np.zeros(tokens, np.uint8)
        start = 0
        for count, kind, layers in self._passes:
            phase[start : start + count] = kind
            for layer, (ids, scores) in layers.items():
                experts[start : start + count, self._column[layer], : ids.shape[1]] = ids
                weights[start : start + count, self._column[layer], : ids.shape[1]] = scores
            start += count
        with open(self.path, "wb") as file:
            np.savez_compressed(
                file,
                experts=experts,
                weights=weights,
                phase=phase,
                passes=np.array([count for count, _, _ in self._passes], np.int32),
                layers=np.array(list(self._column), np.int32),
                num_experts=np.array(self._num_experts),
            )

    def __enter__(self) -> "TraceRecorder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

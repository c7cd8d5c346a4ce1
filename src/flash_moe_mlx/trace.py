"""Routing traces: which experts each token's router picked, recorded while a model runs.

The file is a numpy ``.npz`` with ``experts`` (tokens, layers, K) unsigned, its largest value meaning
"not recorded"; ``weights`` float16 of the same shape, NaN where mlx-lm's own model keeps them;
``phase`` (tokens,) uint8, 0 prefill and 1 decode;
``layers`` (layers,) the model's layer numbers; ``num_experts``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import RequestError

PREFILL, DECODE = 0, 1


class TraceRecorder:
    """Collects routing decisions and writes them when closed. Use as a context manager."""

    def __init__(self, path: str | Path, layers: Sequence[int], num_experts: int):
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise RequestError(f"[trace] the directory {self.path.parent} must exist. Create it first.")
        self._column = {layer: i for i, layer in enumerate(layers)}
        self._num_experts = num_experts
        self._passes: list[tuple[int, int, dict[int, tuple[np.ndarray, np.ndarray]]]] = []
        self.closed = False

    def begin(self, tokens: int, phase: int) -> None:
        """A forward pass of this many tokens starts."""
        self._passes.append((tokens, phase, {}))

    def record(self, layer: int, experts: np.ndarray, weights: np.ndarray) -> None:
        """One layer's choice: ids and weights of shape (tokens, K)."""
        self._passes[-1][2][layer] = (experts.copy(), weights.astype(np.float16))

    def close(self) -> None:
        """Write the file. Later calls do nothing."""
        if self.closed:
            return
        self.closed = True
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
                layers=np.array(list(self._column), np.int32),
                num_experts=np.array(self._num_experts),
            )

    def __enter__(self) -> "TraceRecorder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

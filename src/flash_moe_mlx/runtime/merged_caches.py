"""MergedCaches: the caches of several sequences as those of one batch, which sequences join and leave."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from .steps import Steps


class MergedCaches:
    """Caches of a batch in mlx_lm's form: keys of unequal length are padded on the left.

    Layers are merged and taken apart one by one, so that never more than one layer is in memory twice.

    Attributes:
        caches: The batch's caches, one per layer; empty while no sequence is in it.
        sequences: The sequences, in the order of the batch's rows.
    """

    def __init__(self, model: Any):
        self._model = model
        self.caches: list[Any] = []
        self.sequences: list[Steps] = []

    def join(self, joining: Sequence[Steps]) -> None:
        """Append sequences, whose caches become part of the batch's."""
        parts = [steps.lend(partial(self._copies, steps)) for steps in joining]
        for layer in range(len(parts[0])):
            own = [caches[layer] for caches in parts]
            merged = own[0].merge(own)
            if self.sequences:
                self.caches[layer].extend(merged)
            else:
                self.caches.append(merged)
            mx.eval(self.caches[layer].state)
            del own, merged
            for caches in parts:
                caches[layer] = None
        self.sequences += joining

    def leave(self, leaving: Sequence[Steps], *, for_good: bool = False) -> None:
        """Remove sequences, which own their caches again unless they leave ``for_good``."""
        rows = [row for row, steps in enumerate(self.sequences) if any(steps is other for other in leaving)]
        if not rows:
            return
        kept = [row for row in range(len(self.sequences)) if row not in rows]
        taken: list[list[Any]] = [self._empty() for _ in rows]
        for layer, cache in enumerate(self.caches):
            for row, caches in zip(rows, taken, strict=True):
                if not for_good:
                    caches[layer] = _own_kind(caches[layer], cache.extract(row))
            mx.eval([caches[layer].state for caches in taken if not for_good])
            if kept:
                cache.filter(kept)
                # Without padding that nobody needs any more: what is cut off would stay in memory.
                cache.state = tree_map(lambda v: mx.contiguous(v) if isinstance(v, mx.array) else v, cache.state)
                mx.eval(cache.state)
            else:
                self.caches[layer] = None
        if not kept:
            self.caches = []
        for row, caches in zip(rows, taken, strict=True):
            self.sequences[row].take_back([] if for_good else caches)
        self.sequences = [self.sequences[row] for row in kept]

    def _copies(self, steps: Steps) -> list[Any]:
        row = next(row for row, other in enumerate(self.sequences) if other is steps)
        return [_own_kind(empty, cache.extract(row)) for empty, cache in zip(self._empty(), self.caches, strict=True)]

    def _empty(self) -> list[Any]:
        return list(make_prompt_cache(self._model))


def _own_kind(empty: Any, extracted: Any) -> Any:
    """Return what was extracted as a cache of the model's own class, where that has mlx_lm's name."""
    if type(empty) is not type(extracted) and type(empty).__name__ == type(extracted).__name__:
        empty.state = extracted.state
        return empty
    return extracted

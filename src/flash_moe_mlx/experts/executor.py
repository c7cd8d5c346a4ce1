"""The interface between a model and its routed experts; it hides where experts are computed, and in whose memory.

A model passes the router's choice, then the tokens, and receives outputs. `local.py` streams experts into slots of
this process. An executor that computes some of them elsewhere implements the same protocols.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..ops.fetch_records import HostRecords
from ..ops.norm import Norm
from ..ops.slot_memory import ExpertRecords

if TYPE_CHECKING:
    from ..ops.cpu.program import ExpertOperations
    from ..ops.cpu.vectors import Pool, Vector

ELSEWHERE = -1
"""Id that stands for an expert computed by another executor; its output here is zero."""


class PendingExperts(Protocol):
    """One layer's experts for the tokens of one forward pass, while missing ones are being read."""

    def run(self, x: mx.array, norm: Norm | None = None) -> mx.array:
        """Compute each token's experts.

        Args:
            x: Tokens. Shape (T, H).
            norm: Norm to apply to x; None if the tokens are already normalised.

        Returns:
            Per-expert outputs in the router's order. Shape (T, K, H), float32; zero for ids that are ``ELSEWHERE``.

        Raises:
            StoreError: If a record can't be read.
        """
        ...

    def combined(
        self,
        x: mx.array,
        weights: mx.array,
        shared: mx.array | ExpertRecords,
        shared_gate: mx.array,
        residual: mx.array,
        norm: Norm | None = None,
    ) -> mx.array:
        """Return ``ops.moe_combine`` of the experts' outputs, in one operation if all experts are available.

        Args:
            x: Tokens. Shape (T, H).
            weights: The router's weights. Shape (T, K).
            shared: The shared expert's output, shape (T, H), or its record.
            shared_gate: Logits whose last column is the shared expert's gate. Shape (T, any).
            residual: Residual added to the sum. Shape (T, H).
            norm: Norm to apply to x; None if the tokens are already normalised.

        Returns:
            The combined output. Shape (T, H), in the dtype of ``residual``.

        Raises:
            StoreError: If a record can't be read.
        """
        ...


class OtherRanks(NamedTuple):
    """Other ranks that compute a part of one token's experts on their GPUs.

    Attributes:
        own: Whether each expert is this rank's. Shape (E,), bool.
        complete: Lazily adds up all ranks' outputs, float32; the outputs that a rank doesn't compute are zero.
    """

    own: mx.array
    complete: Callable[[mx.array], mx.array]


class ResidentExperts(Protocol):
    """One layer's experts where a GPU needs no host to use them: in slots, or in memory that it fetches them from.

    Attributes:
        layer: The layer's number.
        slots: The layer's slots.
        table: Slot of each expert, NOT_IN_SLOT for those in none. Shape (E,), uint32.
        landing: Slots to fetch one token's experts into, shape (K,), uint32; None if all experts are in slots.
        target: Address of the slots, as ``ops.fetch_records`` takes it.
        records: Where to fetch experts from; None if all are in slots.
        others: Ranks that compute the other experts; None if all are computed here.
    """

    @property
    def layer(self) -> int: ...

    @property
    def slots(self) -> ExpertRecords: ...

    @property
    def table(self) -> mx.array: ...

    @property
    def landing(self) -> mx.array | None: ...

    @property
    def target(self) -> mx.array: ...

    @property
    def records(self) -> HostRecords | None: ...

    @property
    def others(self) -> OtherRanks | None: ...

    def is_current(self) -> bool:
        """Return whether these experts are still valid and no code on the host needs to see the ids."""
        ...

    def used(self, layers: Sequence[int], ids: mx.array, *, fetched: bool) -> None:
        """Note one token's choices in all layers; one of these objects tells for all.

        Args:
            layers: Numbers of the layers.
            ids: Experts of each, lazy. Shape (L, K).
            fetched: Whether some may have been fetched.
        """
        ...

    def reading(self, output: mx.array) -> None:
        """Note that the lazy array ``output`` reads or fills slots: they are not overwritten before it is evaluated."""
        ...


class TokenExperts(Protocol):
    """The experts of one token as operations of a CPU program, built once per layer.

    Attributes:
        present: Operations on experts that are in memory when `begin` returns.
        missing: Operations on experts that `finish` waits for.
        exchanges: Whether some outputs come from elsewhere; if so, `exchange` must be called after all operations have
            run.
    """

    exchanges: bool

    @property
    def present(self) -> "ExpertOperations": ...

    @property
    def missing(self) -> "ExpertOperations": ...

    def begin(self, ids: np.ndarray, weights: np.ndarray) -> bool:
        """Start reading the missing experts, and point ``present`` at the rest.

        Args:
            ids: The router's choice. Shape (K,), int64.
            weights: The weights of that choice. Shape (K,), float32.

        Returns:
            Whether experts are missing: then call `finish` and run ``missing`` before using the outputs.

        Raises:
            StoreError: If a record can't be read.
        """
        ...

    def finish(self) -> None:
        """Wait for the missing experts, and point ``missing`` at them.

        Raises:
            StoreError: If a record can't be read.
        """
        ...

    def exchange(self) -> None:
        """Complete the outputs after all operations have run. Called only if ``exchanges`` is true."""
        ...


class ExpertExecutor(Protocol):
    """The routed experts of one layer."""

    def begin(
        self,
        ids: mx.array | np.ndarray,
        weights: mx.array | None = None,
        *,
        alongside: Sequence[mx.array] = (),
        traced: bool = True,
    ) -> PendingExperts:
        """Start reading the experts that are missing.

        Args:
            ids: The router's choice. Shape (T, K); `ELSEWHERE` marks ids computed by other executors.
            weights: The weights of that choice, for the trace. Shape (T, K); None if unknown.
            alongside: Lazy arrays to start computing while the ids are being copied to the host.
            traced: Whether to note the choice if a trace is being recorded.

        Raises:
            StoreError: If a record can't be read, now or when the outputs are requested.
        """
        ...

    def resident(self, k: int) -> ResidentExperts | None:
        """Return the layer's experts if no code on the host needs the ids; else None.

        Args:
            k: Number of experts per token.
        """
        ...

    def token_experts(self, x: "Vector", y: np.ndarray, pool: "Pool") -> TokenExperts:
        """Build the operations that compute one token's experts on the CPU.

        Args:
            x: The token. Shape (H,).
            y: Buffer for per-expert outputs. Shape (K, H), float32.
            pool: Scratch memory shared between layers.

        Raises:
            UnsupportedLayerError: If the operations do not support the format of the records.
        """
        ...


def choice_on_host(ids: mx.array | np.ndarray, weights: mx.array | None, alongside: Sequence[mx.array]) -> np.ndarray:
    """Return a router's choice once it is computed, having started the arrays that are needed alongside.

    Args:
        ids: The choice. Shape (T, K).
        weights: Its weights. Shape (T, K).
        alongside: Arrays to compute while experts are read.
    """
    if isinstance(ids, mx.array):
        # Two calls, so that the host can wait for the ids alone while a GPU computes the alongside arrays.
        mx.async_eval(*(array for array in (ids, weights) if array is not None))
    if alongside:
        mx.async_eval(*alongside)
    return np.array(ids)

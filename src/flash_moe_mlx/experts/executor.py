"""The seam between a model and its routed experts: where they are computed, and in whose memory, lies behind it.

A model hands over the router's choice, then the tokens, and gets outputs back. `local.py` streams experts into slots
of this process. An executor that computes some of them elsewhere implements the same two protocols.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np

from ..ops.norm import Norm
from ..ops.slot_memory import ExpertRecords

if TYPE_CHECKING:
    from ..ops.cpu.program import ExpertOperations
    from ..ops.cpu.vectors import Pool, Vector

ELSEWHERE = -1
"""In place of an expert's id: another executor computes it, and here its output is zero."""


class PendingExperts(Protocol):
    """One layer's experts for the tokens of one forward pass; reads of the missing ones are under way."""

    def run(self, x: mx.array, norm: Norm | None = None) -> mx.array:
        """Compute each token's experts.

        Args:
            x: Tokens. Shape (T, H).
            norm: Norm of x; None if the tokens are normalised already.

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
        """Compute ``ops.moe_combine`` of the experts' outputs, in one operation where all are at hand.

        Args:
            x: Tokens. Shape (T, H).
            weights: The router's weights. Shape (T, K).
            shared: The shared expert's output, shape (T, H), or its record.
            shared_gate: Logits whose last column is that of its gate. Shape (T, any).
            residual: Added to the sum. Shape (T, H).
            norm: Norm of x; None if the tokens are normalised already.

        Returns:
            Shape (T, H), in the dtype of ``residual``.

        Raises:
            StoreError: If a record can't be read.
        """
        ...


class ResidentExperts(Protocol):
    """One layer's experts, all of them in slots.

    Attributes:
        slots: The layer's slots.
        table: Slot of each expert. Shape (E,), uint32.
    """

    @property
    def slots(self) -> ExpertRecords: ...

    @property
    def table(self) -> mx.array: ...

    def is_current(self) -> bool:
        """Tell whether these are the experts still, and nobody on the host needs to see ids."""
        ...

    def used(self, ids: mx.array) -> None:
        """Note one token's choice, lazy ids of shape (1, K)."""
        ...

    def reading(self, output: mx.array) -> None:
        """Note that ``output``, not evaluated yet, reads slots: they are not overwritten before it is."""
        ...


class TokenExperts(Protocol):
    """The experts of one token as operations of a CPU program, built once per layer.

    Attributes:
        present: Operations on experts that are in memory when `begin` returns.
        missing: Operations on experts that `finish` waits for.
        exchanges: Whether some outputs come from elsewhere: `exchange` must then be called once all operations have
            run.
    """

    exchanges: bool

    @property
    def present(self) -> "ExpertOperations": ...

    @property
    def missing(self) -> "ExpertOperations": ...

    def begin(self, ids: np.ndarray, weights: np.ndarray) -> bool:
        """Start reading what is missing, and point ``present`` at the rest.

        Args:
            ids: The router's choice. Shape (K,), int64.
            weights: Its weights. Shape (K,), float32.

        Returns:
            Whether experts are missing: `finish` must be called, and ``missing`` run, before outputs are whole.

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
        """Complete the outputs once all operations have run. Called only if ``exchanges``."""
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
            ids: The router's choice. Shape (T, K); `ELSEWHERE` marks ids that others compute.
            weights: Its weights, for the trace. Shape (T, K); None if they are not known.
            alongside: Lazy arrays to start computing once the ids are on their way to the host.
            traced: Whether to note the choice in a trace that is being recorded.

        Raises:
            StoreError: If a record can't be read, now or when the outputs are asked for.
        """
        ...

    def resident(self) -> ResidentExperts | None:
        """Return the layer's experts if all are in slots and nobody on the host needs to see ids; else None."""
        ...

    def token_experts(self, x: "Vector", y: np.ndarray, pool: "Pool") -> TokenExperts:
        """Build the operations that compute one token's experts on the CPU.

        Args:
            x: The token. Shape (H,).
            y: Receives per-expert outputs. Shape (K, H), float32.
            pool: Memory shared between layers.

        Raises:
            UnsupportedLayerError: If the records have what the operations don't know.
        """
        ...

"""The type of the models that load() returns, for editors and type checkers."""

from collections.abc import Iterator
from typing import Any, Protocol

from ..experts.engine import StreamingEngine


class StreamingModel(Protocol):
    """A model whose experts are streamed: an ``mlx.nn.Module`` of any family, with its engine.

    Attributes:
        streaming: The engine: counters, traces, limits.
        layers: The decoder layers.
        vocabulary_size: Number of token ids.
    """

    streaming: StreamingEngine

    @property
    def layers(self) -> list[Any]: ...

    @property
    def vocabulary_size(self) -> int: ...

    def __call__(self, inputs: Any, cache: Any = None, **options: Any) -> Any:
        """Return logits of shape (B, L, vocabulary) of token ids of shape (B, L)."""

    def position_logits(
        self, inputs: Any, cache: Any = None, *, keep: int | None = None, block_bytes: int
    ) -> Iterator[Any]:
        """Yield the logits of the last ``keep`` positions of token ids of shape (1, L), in blocks."""

    def make_cache(self) -> list[Any]:
        """Return empty caches for a conversation, one per layer."""

    def parameters(self) -> dict[str, Any]:
        """Return the dense weights by module; routed experts are not among them."""

"""AnswerFormat: what each API's module gives the routes."""

from collections.abc import Sequence
from typing import Any, Protocol

from .api_error import ApiError
from .generation import Finished
from .parts import AnswerPart


class AnswerFormat(Protocol):
    """An API's form of one answer."""

    def whole(self, parts: Sequence[AnswerPart], finished: Finished) -> dict[str, Any]:
        """Return the complete answer."""

    def start(self) -> bytes:
        """Return what a stream begins with."""

    def part(self, part: AnswerPart) -> bytes:
        """Return what a stream sends of one part."""

    def silence(self) -> bytes:
        """Return what a stream sends when nothing was said for a while."""

    def end(self, finished: Finished) -> bytes:
        """Return what a stream ends with."""

    def failed(self, error: ApiError) -> bytes:
        """Return what a stream sends in place of its end."""

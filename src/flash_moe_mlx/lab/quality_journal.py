"""Scores of a text's windows, and the file that keeps those that are finished.

Floats read back as they were written, so a resumed measurement gives the numbers of an uninterrupted one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..formats.line_journal import LineJournal


@dataclass(frozen=True)
class Window:
    """Sums over the tokens of a window that were predicted.

    Attributes:
        tokens: Number of predicted tokens.
        nll: Negative log-likelihood of the tokens.
        reference_nll: The same by the reference.
        kl: KL divergence of the model's distribution from the reference's, in nats.
        kl_max: Largest divergence of a token.
        agreed: Tokens at which both find the same token likeliest.
    """

    tokens: int
    nll: float
    reference_nll: float = 0.0
    kl: float = 0.0
    kl_max: float = 0.0
    agreed: int = 0


class WindowJournal:
    """Windows that are finished, kept in a file if there is one. A context manager.

    Attributes:
        windows: Finished windows, in order.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]):
        """Open or create the file.

        Raises:
            RequestError: If the file is no journal, or that of another measurement.
        """

        def refusal(what: str, was: Any, now: Any) -> RequestError:
            return RequestError(
                f"[quality] {path} must be resumed with the same {what}, got {now!r:.150} where it was {was!r:.150}. "
                "Undo the change, or name a new journal."
            )

        def foreign() -> RequestError:
            return RequestError(f"[quality] {path} must be a journal of quality, got another file. Name a new one.")

        self._lines = None if path is None else LineJournal(path, identity, refusal, foreign)
        self.windows = [] if self._lines is None else [Window(**entry) for entry in self._lines.entries]

    def append(self, window: Window) -> None:
        """Add a finished window."""
        self.windows.append(window)
        if self._lines is not None:
            self._lines.append([asdict(window)])

    def __enter__(self) -> "WindowJournal":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._lines is not None:
            self._lines.close()

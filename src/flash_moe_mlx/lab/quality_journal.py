"""A file of finished windows: one line of JSON each, after a first line that says what is measured.

A line that a crash cut off is dropped, and its window is scored again. Floats read back as they were written, so a
resumed measurement gives the numbers of an uninterrupted one.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import RequestError


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
        self.windows: list[Window] = []
        self._file = None
        if path is None:
            return
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by __exit__
        try:
            end = self._read(path, json.loads(json.dumps(identity)))
        except RequestError:
            self._file.close()
            raise
        self._file.truncate(end)
        if end == 0:
            self._write(identity)

    def append(self, window: Window) -> None:
        """Add a finished window."""
        self.windows.append(window)
        self._write(asdict(window))

    def __enter__(self) -> "WindowJournal":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path, identity: dict[str, Any]) -> int:
        """Read the complete lines. Returns the offset of their end."""
        assert self._file is not None
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file.read().splitlines(keepends=True)):
            value = _parse(line)
            if number == 0:
                _check_identity(path, value, identity)
            elif isinstance(value, dict) and set(value) == {field.name for field in fields(Window)}:
                self.windows.append(Window(**value))
            else:
                break
            end += len(line)
        return end

    def _write(self, value: Mapping[str, Any]) -> None:
        if self._file is not None:
            data = json.dumps(value, separators=(",", ":")).encode() + b"\n"
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())


def _parse(line: bytes) -> Any:
    """Return a line's value, or None if it is incomplete."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _check_identity(path: Path, found: Any, expected: dict[str, Any]) -> None:
    if not isinstance(found, dict) or found.get("journal") != expected["journal"]:
        raise RequestError(f"[quality] {path} must be a journal of quality, got another file. Name a new one.")
    differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    if differing:
        key = differing[0]
        raise RequestError(
            f"[quality] {path} must be resumed with the same {key}, got {expected.get(key)!r:.150} where it was "
            f"{found.get(key)!r:.150}. Undo the change, or name a new journal."
        )

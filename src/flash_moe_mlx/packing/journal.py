"""The journal of a packing: a line for each finished task, written after its bytes have reached the disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PackError
from ..formats.line_journal import LineJournal
from .quantiser import ErrorSums
from .tasks import TaskResult


class Journal:
    """An open journal.

    Attributes:
        results: Results of finished tasks, by number. The caller adds those passed to `append`.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        """Open or create a journal.

        Raises:
            PackError: If the journal belongs to another packing: other settings, or a source that has changed.
        """
        self._lines = LineJournal(path, identity, _refusal)
        self.results: dict[int, TaskResult] = dict(map(_from_json, self._lines.entries))

    def append(self, results: Mapping[int, TaskResult]) -> None:
        """Record finished tasks, whose bytes must already have reached the disk."""
        self._lines.append(_to_json(number, result) for number, result in results.items())

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _refusal(what: str, was: Any, now: Any) -> PackError:
    return PackError(
        f"[pack] a packing can only continue with the same {what}, got {now!r:.150} where it was {was!r:.150}. "
        "Undo the change, or start over with restart=True (--restart)."
    )


def _to_json(number: int, result: TaskResult) -> dict[str, Any]:
    errors = {name: vars(error) for name, error in result.errors.items()}
    return {"task": number, "crc32": [f"{value:08x}" for value in result.checksums], "errors": errors}


def _from_json(value: Mapping[str, Any]) -> tuple[int, TaskResult]:
    errors = {name: ErrorSums(**error) for name, error in value["errors"].items()}
    return value["task"], TaskResult(tuple(int(text, 16) for text in value["crc32"]), errors)

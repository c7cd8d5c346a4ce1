"""A journal of finished tasks: one line each, written after their bytes have reached the disk.

A line is the CRC-32 of its text, a space, and JSON. The first line identifies the packing. Anything after the last
complete line, as a crash may leave it, is cut off, and those tasks are repeated.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PackError
from .quantiser import ErrorSums
from .tasks import TaskResult


class Journal:
    """An open journal.

    Attributes:
        identity: Identity of the packing; must equal that of the first line.
        results: Results of finished tasks, by number. The caller adds those passed to `append`.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        """Open or create a journal.

        Raises:
            PackError: If the journal belongs to another packing: other settings, or a source that has changed.
        """
        self.identity = identity
        self.results: dict[int, TaskResult] = {}
        self._path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by close()
        opened = False
        try:
            end = self._read()
            self._file.truncate(end)
            if end == 0:
                self._write(_line(identity))
            opened = True
        finally:
            if not opened:
                self._file.close()

    def append(self, results: Mapping[int, TaskResult]) -> None:
        """Record finished tasks, whose bytes must already have reached the disk."""
        self._write(b"".join(_line(_to_json(number, result)) for number, result in results.items()))

    def close(self) -> None:
        self._file.close()

    def _read(self) -> int:
        """Read the complete lines. Returns the offset of their end."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file.read().splitlines(keepends=True)):
            value = _parse(line)
            if value is None:
                break
            if number == 0:
                _check_identity(value, self.identity)
            else:
                task, result = _from_json(value)
                self.results[task] = result
            end += len(line)
        return end

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())


def _check_identity(found: Any, expected: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(expected))
    if found == expected:
        return
    differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    what = differing[0]
    was, now = found.get(what), expected.get(what)
    if isinstance(was, dict) and isinstance(now, dict):
        part = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))[0]
        what, was, now = f"{what} {part}", was.get(part), now.get(part)
    raise PackError(
        f"[pack] a packing can only continue with the same {what}, got {now!r:.150} where it was {was!r:.150}. "
        "Undo the change, or start over with restart=True (--restart)."
    )


def _line(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _parse(line: bytes) -> Any:
    """Return a line's value, or None if it is incomplete."""
    if not line.endswith(b"\n") or line[8:9] != b" " or line[:8] != f"{zlib.crc32(line[9:-1]):08x}".encode():
        return None
    return json.loads(line[9:-1])


def _to_json(number: int, result: TaskResult) -> dict[str, Any]:
    errors = {name: vars(error) for name, error in result.errors.items()}
    return {"task": number, "crc32": [f"{value:08x}" for value in result.checksums], "errors": errors}


def _from_json(value: Mapping[str, Any]) -> tuple[int, TaskResult]:
    errors = {name: ErrorSums(**error) for name, error in value["errors"].items()}
    return value["task"], TaskResult(tuple(int(text, 16) for text in value["crc32"]), errors)

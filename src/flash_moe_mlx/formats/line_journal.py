"""LineJournal: a file of finished work, one line of JSON for each part, after a first line that identifies the work.

A line is the CRC-32 of its text, a space, and JSON. Anything after the last complete line, as a crash may leave it, is
cut off, and that part is repeated.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Refusal = Callable[[str, Any, Any], Exception]
"""Returns the error for a difference: what differs, its value in the file, and its value now."""


class LineJournal:
    """An open journal.

    Attributes:
        entries: What the file held when it was opened, line by line.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        refusal: Refusal,
        foreign: Callable[[], Exception] | None = None,
    ):
        """Open or create a journal.

        Args:
            path: The file.
            identity: Identity of the work, which the first line must have.
            refusal: Error to raise if it has another one.
            foreign: Error to raise if the first line is none of a journal's. Without it, the file is begun anew.
        """
        self.entries: list[Any] = []
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by close()
        opened = False
        try:
            self._file.seek(0)
            content = self._file.read()
            end = self._read(content, json.loads(json.dumps(identity)), refusal)
            if foreign is not None and content and not end:
                raise foreign()
            self._file.truncate(end)
            if not end:
                self._write(_line(identity))
            opened = True
        finally:
            if not opened:
                self._file.close()

    def append(self, values: Iterable[Any]) -> None:
        """Add a line for each value. Its results must already have reached the disk."""
        self._write(b"".join(map(_line, values)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, content: bytes, identity: dict[str, Any], refusal: Refusal) -> int:
        """Read the complete lines. Returns the offset of their end."""
        end = 0
        for line in content.splitlines(keepends=True):
            value = _parse(line)
            if value is None:
                break
            if end:
                self.entries.append(value)
            elif difference := _difference(value, identity):
                raise refusal(*difference)
            end += len(line)
        return end

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first part that differs, with both values, or None if none does."""
    if found == expected:
        return None
    what = min(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    was, now = found.get(what), expected.get(what)
    if isinstance(was, dict) and isinstance(now, dict):
        part = min(key for key in {*was, *now} if was.get(key) != now.get(key))
        return f"{what} {part}", was.get(part), now.get(part)
    return what, was, now


def _line(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _parse(line: bytes) -> Any:
    """Return a line's value, or None if it is incomplete."""
    if not line.endswith(b"\n") or line[8:9] != b" " or line[:8] != f"{zlib.crc32(line[9:-1]):08x}".encode():
        return None
    return json.loads(line[9:-1])

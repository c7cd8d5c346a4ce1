"""A tool that reads files: flash-moe chat --tools examples/tools/read_file.py.

The model sees whatever you may read, so look at the path before you say yes.
"""

from pathlib import Path

MAX_CHARACTERS = 20_000


def read_file(path: str, first_line: int = 1) -> str:
    """Read a text file.

    Args:
        path: Path of the file.
        first_line: Line to begin at, counted from 1.
    """
    with Path(path).expanduser().open(encoding="utf-8", errors="replace") as file:
        for _ in range(first_line - 1):
            file.readline()
        return file.read(MAX_CHARACTERS)

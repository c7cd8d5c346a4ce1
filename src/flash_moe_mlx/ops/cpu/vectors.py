"""Vectors passed between a program's operations, and the memory that layers share."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import decode_tasks as tasks
from .arrays import empty
from .kernels import Format, permutation
from .program import Operation


class Vector:
    """Rows of float32 between operations, and copies in the layouts that products read them in.

    Attributes:
        size: Values per row.
        data: Shape (rows, size), float32.
        permutes: Operations that lay the rows out for products; they run once ``data`` is written.
    """

    def __init__(self, size: int, rows: int = 1, ranks: np.ndarray | None = None, *, int8: bool = False):
        """Allocate the rows.

        Args:
            size: Values per row.
            rows: Number of rows.
            ranks: Row that each task takes, shape (rows,), int64; None for the task's own number.
            int8: Whether products of 4-bit weights read the rows in 8 bits.
        """
        self.size = size
        self.int8 = int8
        self.data = empty(rows, size)
        self.permutes: list[Operation] = []
        self._rows, self._ranks = rows, ranks
        self._ordered: dict[tuple[int, int, bool, bool], tuple[np.ndarray, np.ndarray]] = {}

    def format(self, form: Format) -> Format:
        """Return the format in which matrices stored like this are multiplied with this vector."""
        return form.rounded(self.size) if self.int8 else form

    def input(self, form: Format) -> tuple[Any, Any]:
        """Return the inputs of products with matrices of a format that ``format`` returned: x and its group sums."""
        if not form.bits:
            return self.data, 0
        key = (form.bits, form.group_size, form.int8, form.coded)
        if key not in self._ordered:
            groups, ranks = form.groups(self.size), 0 if self._ranks is None else self._ranks
            ordered: np.ndarray
            how: tuple[Any, ...]
            operation: Operation
            if form.int8:
                ordered, sums = np.empty((self._rows, self.size), np.int8), empty(self._rows, 2, groups)
                how = (form.group_size, ordered, sums, ranks)
                operation = Operation(tasks.round_x, self._rows, self.data, self.size, *how)
            else:
                ordered, sums = empty(self._rows, self.size), empty(self._rows, groups)
                how = (form.group_size, ordered, sums, ranks)
                operation = Operation(tasks.permute, self._rows, self.data, self.size, *permutation(form), *how)
            operation.row[3] = int(bool(self.permutes))
            self.permutes.append(operation)
            self._ordered[key] = ordered, sums
        return self._ordered[key]


class Pool:
    """Named memory of a decode step. Layers run in sequence, so those of one shape share their memory."""

    def __init__(self, *, int8: bool):
        """Start empty.

        Args:
            int8: Whether products of 4-bit weights read vectors in 8 bits.
        """
        self._int8 = int8
        self._made: dict[tuple[Any, ...], Any] = {}

    def floats(self, name: str, *shape: int) -> np.ndarray:
        """Return uninitialised float32."""
        return self.get((name, "floats", *shape), lambda: empty(*shape))

    def integers(self, name: str, size: int) -> np.ndarray:
        """Return zeros, int64."""
        return self.get((name, "integers", size), lambda: np.zeros(size, np.int64))

    def vector(self, name: str, size: int, rows: int = 1, ranks: np.ndarray | None = None) -> Vector:
        """Return a `Vector`."""
        return self.get((name, size, rows), lambda: Vector(size, rows, ranks, int8=self._int8))

    def get(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return the object for a key, created by ``make`` on first use."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

"""Program: a decode step as a list of operations that threads run without returning to Python.

One row of x passes through about fifteen operations per layer, of 1 to 300 microseconds each. Called one by one, each
would cost as much again in Python, in MLX's switch to its own thread and in waking threads. A program's operations
start in order, each when all before it have ended; all threads share the tasks of an operation.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .arrays import address, view
from .jit import compiled
from .memory_ir import add_one, call
from .threads import ALONE_BYTES, STEP_SPINS, run, wait_for

_TASKS = 2  # columns of the table: function, arguments, tasks, concurrent


def _run_tasks(table, total, state):  # type: ignore[no-untyped-def]
    counter = state.ctypes.data
    operation, first, needed = 0, 0, 0
    while True:
        task = add_one(counter)
        # Passed by value: in the table, a late thread may find the next call's numbers.
        if task >= total:
            break
        while task >= first + table[operation, 2]:
            first += table[operation, 2]
            operation += 1
            if not table[operation, 3]:
                needed = first
        wait_for(counter + 8, needed, STEP_SPINS)
        call(table[operation, 0], table[operation, 1], task - first)
        add_one(counter + 8)
    return total


_run_tasks_kernel = compiled(_run_tasks)


class Operation:
    """One operation: a compiled function of (address of its arguments, number of its task).

    Attributes:
        arguments: Numbers and addresses that it reads; may be changed between runs. Shape (A,), int64.
        tasks: Number of its tasks.
    """

    def __init__(self, function: Any, tasks: int, *arguments: Any, concurrent: bool = False, nbytes: int = 0):
        """Bind a function.

        Args:
            function: Function compiled by ``jit.task``.
            tasks: Number of its tasks.
            *arguments: int, float, or an array of either library, which is passed by address and kept alive.
            concurrent: Whether it may start together with the previous operation.
            nbytes: Approximate number of bytes it reads, compared with ``ALONE_BYTES``.
        """
        # The memory that is read, which of a strided array is a copy's.
        held = [view(value, np.uint8) if isinstance(value, mx.array) else value for value in arguments]
        self._kept = (function, held)
        self.arguments = np.array([_packed(value) for value in held], np.int64)
        self.tasks = tasks
        self.nbytes = nbytes
        self.row = [function.address, address(self.arguments), tasks, int(concurrent)]


def _packed(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return address(value)
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return int(value)


class Program:
    """Operations in order."""

    def __init__(self, operations: Sequence[Operation]):
        self._operations = tuple(operations)
        self._table = np.array([operation.row for operation in operations], np.int64)
        self._alone = sum(operation.nbytes for operation in operations) < ALONE_BYTES
        self._place = {id(operation): place for place, operation in enumerate(operations)}
        self._tasks = [operation.row[_TASKS] for operation in operations]

    def set_tasks(self, operation: Operation, tasks: int) -> None:
        """Change the number of an operation's tasks in this program; 0 skips it."""
        place = self._place[id(operation)]
        self._table[place, _TASKS] = self._tasks[place] = tasks

    def update(self, operations: "ExpertOperations") -> None:
        """Copy the current number of tasks from operations on experts."""
        for operation in operations.changing:
            self.set_tasks(operation, operation.tasks)

    def run(self) -> None:
        """Run all operations to completion."""
        run(_run_tasks_kernel, self._table, sum(self._tasks), alone=self._alone)


def together(*groups: Sequence[Operation]) -> list[Operation]:
    """Combine operations that may all start at once."""
    operations = [operation for group in groups for operation in group]
    for place, operation in enumerate(operations):
        operation.row[3] = int(place > 0)
    return operations


class ExpertOperations:
    """Operations of the feed-forward of up to K experts, in three stages.

    Attributes:
        gate_up: Products with gate and up projections.
        permute: Operations that lay the hidden activations out for products.
        down: Products with down projections.
    """

    def __init__(self, gate_up: Sequence[Operation], permute: Sequence[Operation], down: Sequence[Operation]):
        self.gate_up, self.permute, self.down = list(gate_up), list(permute), list(down)
        self.changing = (*gate_up, *permute, *down)

    @classmethod
    def joined(cls, parts: "Sequence[ExpertOperations]") -> "ExpertOperations":
        """Combine the operations of several groups of experts, stage by stage."""
        return cls(*([op for part in parts for op in getattr(part, s)] for s in ("gate_up", "permute", "down")))

    def stages(self, *before: "ExpertOperations") -> list[Operation]:
        """Lay out the operations in order, each stage together with the same stage of ``before``."""
        names = ("gate_up", "permute", "down")
        return [op for s in names for op in together(*(getattr(each, s) for each in (*before, self)))]

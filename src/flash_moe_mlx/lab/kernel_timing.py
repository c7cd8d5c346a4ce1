"""Alternating timing of two sides on rotating inputs, relative to the device's copy bandwidth."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import mlx.core as mx

from ..ops.backend import backend

Work = Callable[[], list[mx.array]]
"""Function that builds the graph of ``calls`` calls on rotating inputs and returns the arrays to evaluate."""


@dataclass
class Row:
    """One row of the table.

    Attributes:
        name: Name of the case.
        ours_us: Median microseconds per call of our side.
        theirs_us: The same for the other side; None if there is none.
        nbytes: Bytes that a call must read and write once.
        relative_rms: Relative difference of our result from the other side's, computed in float32 where it can be.
        spread: Smallest and largest of our samples.
    """

    name: str
    ours_us: float
    theirs_us: float | None
    nbytes: int
    relative_rms: float | None = None
    spread: tuple[float, float] = (0.0, 0.0)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.ours_us / 1e3


def sample(work: Work, calls: int) -> float:
    """Time one evaluation, in microseconds per call. On the CPU, whose kernels are eager, building the graph counts."""
    start = time.perf_counter()
    outputs = work()
    if backend() != "cpu":
        mx.synchronize()
        start = time.perf_counter()
    mx.eval(outputs)
    mx.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def alternate(sides: list[Work], calls: int, samples: int) -> list[list[float]]:
    """Sample both sides alternately, after one warm-up each."""
    for side in sides:
        sample(side, calls)
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(samples):
        for times, side in zip(taken, sides, strict=True):
            times.append(sample(side, calls))
    return taken


def compare(
    name: str, ours: Work, theirs: Work | None, calls: int, nbytes: int, samples: int, relative_rms: float | None = None
) -> Row:
    """Time two implementations of the same work."""
    sides = [ours] if theirs is None else [ours, theirs]
    taken = alternate(sides, calls, samples)
    other = None if theirs is None else median(taken[1])
    return Row(name, median(taken[0]), other, nbytes, relative_rms, (min(taken[0]), max(taken[0])))


def relative_rms(result: mx.array, reference: mx.array) -> float:
    """Return the RMS of the differences relative to the RMS of the reference."""
    result, reference = result.astype(mx.float32), reference.astype(mx.float32)
    return float(mx.sqrt(((result - reference) ** 2).sum() / (reference**2).sum()))


def copy_bandwidth(nbytes: int, samples: int = 7) -> float:
    """Return the GB/s of an elementwise pass over a large array, counting bytes read plus bytes written."""
    array = mx.zeros((nbytes // 4,), mx.uint32)
    mx.eval(array)

    def work() -> list[mx.array]:
        return [array + 1]

    sample(work, 1)
    return 2 * nbytes / min(sample(work, 1) for _ in range(samples)) / 1e3

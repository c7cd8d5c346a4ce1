"""Predict each decoding speed of docs/performance.md from bytes, rates and launches, and compare.

    python -m benchmarks.roofline            # prints the table of docs/performance.md

Two predictions per row: with perfect overlap a token takes the longest of its parts, without any it takes their sum.
The parts are the bytes it misses over the disk's or bus's rate, the bytes of weights it uses over the memory's rate,
and its launches.
"""

from dataclasses import dataclass

DENSE_35B, EXPERTS_35B = 1.10e9, 0.566e9  # bytes per token: 4-bit weights without the embeddings; K 8
DENSE_397B, RECORD_397B = 4.88e9, 7.08e6
LAYERS_397B = 60


@dataclass(frozen=True)
class Rates:
    """A machine's rates.

    Attributes:
        memory: Bytes of weights per second that the processor or GPU can use.
        source: Bytes of missed experts per second.
        launch: Seconds of the host per GPU launch, what Python does for it included.
    """

    memory: float
    source: float
    launch: float


@dataclass(frozen=True)
class Row:
    """A measured speed and what it is predicted from.

    Attributes:
        name: What was run.
        rates: Rates of that machine.
        used: Bytes of weights per token.
        missed: Bytes of experts per token that were in no slot.
        launches: GPU launches per token.
        measured: Median of the measured tokens per second.
        cause: What is left on the table.
    """

    name: str
    rates: Rates
    used: float
    missed: float
    launches: int
    measured: float
    cause: str

    @property
    def parts(self) -> tuple[float, float, float]:
        """Seconds per token of missed experts, weights and launches."""
        rates = self.rates
        return self.missed / rates.source, self.used / rates.memory, self.launches * rates.launch

    @property
    def overlapped(self) -> float:
        """Tokens per second if all parts overlap."""
        return 1 / max(self.parts)

    @property
    def in_turn(self) -> float:
        """Tokens per second if none does."""
        return 1 / sum(self.parts)


# Two cores of an AMD EPYC: the bytes of weights that both dequantise, and a simulated disk.
CPU = Rates(15e9, 4e9, 0)
CPU_8_BIT = Rates(23e9, 4e9, 0)  # the same with activations of 8 bits
SLOW_DISK = Rates(15e9, 1e9, 0)
# H200: memory by its data sheet, copies out of mapped files. A launch costs what makes the first row of the best call
# and of the last session, on a slower host, come out.
BEST = Rates(4.8e12, 46e9, 18.5e-6)
LATER = Rates(4.8e12, 46e9, 27.6e-6)

LAUNCHES_35B, LAUNCHES_397B = 30 * 7 + 10 * 10, 45 * 7 + 15 * 10
FETCHES_35B, FETCHES_397B = LAUNCHES_35B + 40, LAUNCHES_397B + LAYERS_397B

_LATE = "reads begin when the layer's router has spoken"
_HOST = "the host: building and launching a token"
_BUS = "copies wait for a router, launches for copies"


def _used_397b(k: int) -> float:
    return DENSE_397B + LAYERS_397B * k * RECORD_397B


ROWS = [
    Row("CPU, 35B, no limit, warm", CPU, DENSE_35B + EXPERTS_35B, 0, 0, 8.4, "norms, attention, delta rule"),
    Row("the same, 8-bit activations", CPU_8_BIT, DENSE_35B + EXPERTS_35B, 0, 0, 10.2, "the same, and rounding"),
    Row("CPU, 35B, 12 GiB, uniform", CPU, DENSE_35B + EXPERTS_35B, 213e6, 0, 6.6, _LATE),
    Row("CPU, 35B, 8 GiB, uniform", CPU, DENSE_35B + EXPERTS_35B, 339e6, 0, 5.8, _LATE),
    Row("CPU, 35B, 4 GiB, uniform", CPU, DENSE_35B + EXPERTS_35B, 484e6, 0, 4.4, _LATE),
    Row(
        "CPU, 35B, 8 GiB, disk of 1 GB/s",
        SLOW_DISK,
        DENSE_35B + EXPERTS_35B,
        339e6,
        0,
        2.9,
        "nothing: the disk is busy",
    ),
    Row("H200, 35B, all in GPU memory", BEST, DENSE_35B + EXPERTS_35B, 0, LAUNCHES_35B, 174, _HOST),
    Row("H200, 35B, fewest slots", BEST, DENSE_35B + EXPERTS_35B, 566e6, FETCHES_35B, 48.4, _BUS),
    Row("H200, 397B, K 4, all in GPU memory", BEST, _used_397b(4), 0, LAUNCHES_397B, 132, _HOST),
    Row("H200, 397B, K 4, fewest slots", BEST, _used_397b(4), 1.699e9, FETCHES_397B, 20.7, _BUS),
    Row("H200, 35B, all in GPU memory, later", LATER, DENSE_35B + EXPERTS_35B, 0, LAUNCHES_35B, 117, _HOST),
    Row("H200, 35B, half, local, later", LATER, DENSE_35B + EXPERTS_35B, 0.2e6, FETCHES_35B, 104, _HOST),
    Row("H200, 397B, K 4, 18 %, local, later", LATER, _used_397b(4), 1.029e9, FETCHES_397B, 27.1, _BUS),
    Row("H200, 397B, K 4, fewest slots, later", LATER, _used_397b(4), 1.699e9, FETCHES_397B, 19.8, _BUS),
    Row("H200, 397B, K 10, fewest slots, later", LATER, _used_397b(10), 4.247e9, FETCHES_397B, 9.4, _BUS),
]


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| decode | missed, ms | weights, ms | launches, ms | overlapped, tok/s | in turn, tok/s | measured |"
        " left on the table |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in ROWS:
        parts = " | ".join(f"{1000 * part:.1f}" for part in row.parts)
        share = f"{row.measured:g} ({row.measured / row.overlapped:.0%})"
        lines.append(f"| {row.name} | {parts} | {row.overlapped:.1f} | {row.in_turn:.1f} | {share} | {row.cause} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())

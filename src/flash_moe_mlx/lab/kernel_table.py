"""The table of kernel timings: its cases and rows."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from ..ops.backend import backend
from . import kernel_cases as cases
from .kernel_timing import Row, copy_bandwidth

HEADER = "work                                      us    (min..max)      other us  ratio     GB/s  of copy  rel rms"

Work = Callable[[], Row]


@dataclass(frozen=True)
class Size:
    """Sizes of the benchmark cases.

    Attributes:
        models: Dimensions of the layers.
        matrix: Rows and columns of the matrix-vector products.
        output_projection: Rows and columns of an output projection, of which there are few copies.
        heads: Key heads, value heads and head size in the gated delta rule.
        tokens: Prompt length in the gated delta rule.
        calls: Calls per sample, each on different inputs.
        prompts: Consecutive prompt calls of the gated delta rule per sample.
        copies: Number of matrices used in turn.
        states: Number of gated delta states used in turn.
        samples: Samples per side; the median is reported.
        copy_bytes: Size of the array copied to measure bandwidth.
    """

    models: tuple[cases.Model, ...] = cases.MODELS
    matrix: tuple[int, int] = (16384, 4096)
    output_projection: tuple[int, int] = (248320, 4096)
    heads: tuple[int, int, int] = (16, 64, 128)
    tokens: int = 512
    calls: int = 128
    prompts: int = 4
    copies: int = 16
    states: int = 32
    samples: int = 9
    copy_bytes: int = 2**30


FULL = Size()
QUICK = Size((cases.Model("small", 256, 128, 16),), (512, 256), (1024, 256), (2, 4, 64), 8, 2, 2, 2, 2, 1, 2**26)


@dataclass
class Layers:
    """MoE layers, created on first use."""

    made: dict[tuple[str, int], cases.Layer] = field(default_factory=dict)

    def get(self, model: cases.Model, bits: int) -> cases.Layer:
        if (model.name, bits) not in self.made:
            self.made[model.name, bits] = cases.Layer(model, bits)
        return self.made[model.name, bits]


def standard_work(size: Size, layers: Layers) -> Iterator[Work]:
    """Yield the table's cases, one per row."""
    calls, samples, copies = size.calls, size.samples, size.copies
    for model, bits, choices in [
        *((model, 4, (4, 8, 10)) for model in size.models),
        (size.models[0], 4, (16,)),
        (size.models[0], 2, (4, 10, 16)),
    ]:
        for experts in choices:
            yield partial(_moe_layer, layers, model, bits, experts, calls=calls, samples=samples)
    rounds = max(1, calls // copies)
    for bits, rows in ((4, 1), (2, 1), (8, 1), (4, 2), (4, 4), (4, 8)):
        yield partial(cases.matvec, *size.matrix, bits, rows, copies=copies, rounds=rounds, samples=samples)
    for bits in (4, 2):
        yield partial(
            cases.matvec, *size.output_projection, bits, 1, copies=2, rounds=max(1, calls // 16), samples=samples
        )
    yield partial(cases.delta_step, *size.heads, calls=calls, states=size.states, samples=samples)
    yield partial(cases.delta_conv_step, *size.heads, calls=calls, states=size.states, samples=samples)
    yield partial(cases.delta_prompt, size.tokens, *size.heads, calls=size.prompts, samples=min(samples, 5))


def _moe_layer(layers: Layers, model: cases.Model, bits: int, experts: int, **options: Any) -> Row:
    return cases.moe_layer(layers.get(model, bits), experts, **options)


class Table:
    """Table rows, passed to ``show`` as lines as they are measured.

    Seeds MLX's generator, so that every run has the same inputs.

    Attributes:
        copy: Copy bandwidth of the device in GB/s, bytes read plus bytes written.
        rows: Rows so far.
    """

    def __init__(self, size: Size, show: Callable[[str], None]):
        mx.random.seed(0)
        self.copy = copy_bandwidth(size.copy_bytes)
        self.rows: list[Row] = []
        self._show = show
        show(f"backend {backend()}, device {mx.device_info().get('device_name', 'cpu')}, copy {self.copy:.0f} GB/s")
        show(HEADER)

    def add(self, row: Row) -> None:
        """Add a row and show it."""
        self.rows.append(row)
        other = f"{row.theirs_us:9.1f} {row.theirs_us / row.ours_us:6.2f}" if row.theirs_us else " " * 16
        close = f"{row.relative_rms:.1e}" if row.relative_rms is not None else ""
        low, high = row.spread
        rate = row.gigabytes_per_second
        self._show(
            f"{row.name:38} {row.ours_us:8.1f} ({low:.1f}..{high:.1f})".ljust(66)
            + f"{other} {rate:8.0f} {rate / self.copy:7.0%}  {close}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the whole table for a JSON document."""
        return {
            "backend": backend(),
            "device": mx.device_info().get("device_name", "cpu"),
            "copy_gb_s": self.copy,
            "rows": [asdict(row) | {"of_copy": row.gigabytes_per_second / self.copy} for row in self.rows],
        }

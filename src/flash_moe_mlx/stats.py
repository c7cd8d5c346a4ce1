"""Counters of the streaming engine and their text and HTML forms. Plain data: no MLX import."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any


@dataclass
class Counters:
    """Monotonic counters of a running engine. The difference of two copies describes the time between them."""

    tokens: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    row_reads: int = 0
    row_bytes: int = 0

    def copy(self) -> "Counters":
        return Counters(*(getattr(self, f.name) for f in fields(self)))

    def since(self, earlier: "Counters") -> "Counters":
        """Return the difference between these counters and ``earlier``."""
        return Counters(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float:
        """Share of requested experts that were in memory, 0 to 1; 0 before the first request."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    def figures(self) -> dict[str, Any]:
        """Return the counters and the hit rate by name."""
        return {**vars(self), "hit_rate": self.hit_rate}


@dataclass(frozen=True)
class GenerationStats:
    """Streaming statistics of one generation so far, attached to each response.

    Attributes:
        hit_rate: Share of requested experts that were in memory, 0 to 1.
        bytes_read: Expert bytes read from storage (page cache included).
        read_seconds: Time the model waited for reads, in seconds.
        hits: Experts found in memory, counted once per layer and forward pass.
        misses: Experts that had to be read.
    """

    hit_rate: float = 0.0
    bytes_read: int = 0
    read_seconds: float = 0.0
    hits: int = 0
    misses: int = 0

    @classmethod
    def from_counters(cls, counters: Counters) -> "GenerationStats":
        return cls(counters.hit_rate, counters.bytes_read, counters.read_seconds, counters.hits, counters.misses)


class NamedRows:
    """Base class that prints ``rows()`` as a short table, and as HTML in a notebook."""

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs in display order."""
        raise NotImplementedError

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        return table_html(self.rows())


@dataclass(frozen=True)
class StreamingStats(NamedRows):
    """A snapshot of a running engine. Prints as a short table, and as HTML in a notebook.

    Attributes:
        tokens: Tokens processed by the model, including prompts.
        hits, misses, hit_rate: Requested experts, counted once per layer and forward pass.
        bytes_read: Expert bytes read from storage (page cache included).
        read_seconds: Time the model waited for reads, in seconds.
        memory_limit_bytes: The memory limit.
        peak_memory_bytes: MLX's peak memory plus the engine's own buffers.
        dense_bytes: Weights kept in memory.
        slot_bytes: Memory of the expert slots.
        num_slots: Total number of expert slots in all layers.
        num_experts: Total number of experts in all layers.
        io: How expert bytes are read.
        lossy: Requested settings that change results; empty by default.
        io_reason: The reason for the choice of ``io``.
        slow_decode: The reason why single tokens are decoded through MLX, several times slower; empty if they are not.
        gpu_memory_limit_bytes: The hard bound on the GPU's own memory, which then holds weights and slots; None where
            there is one memory.
        host_bytes: Host memory that experts come from, pinned for the GPU; 0 where there is one memory.
        row_reads: Rows read from lookup tables that stay in their files, counted once for each tensor of a table.
        row_bytes: Bytes of these rows.
    """

    tokens: int
    hits: int
    misses: int
    hit_rate: float
    bytes_read: int
    read_seconds: float
    memory_limit_bytes: int
    peak_memory_bytes: int
    dense_bytes: int
    slot_bytes: int
    num_slots: int
    num_experts: int
    io: str
    lossy: tuple[str, ...] = ()
    io_reason: str = ""
    slow_decode: str = ""
    gpu_memory_limit_bytes: int | None = None
    host_bytes: int = 0
    row_reads: int = 0
    row_bytes: int = 0

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs in display order."""
        limit_bytes = self.gpu_memory_limit_bytes or self.memory_limit_bytes
        peak = "peak memory" if self.gpu_memory_limit_bytes is None else "peak GPU memory"
        rows = [
            ("tokens", f"{self.tokens:,}"),
            ("hit rate", f"{self.hit_rate:.1%} ({self.hits:,} of {self.hits + self.misses:,} experts)"),
            ("bytes read", format_bytes(self.bytes_read)),
            ("I/O wait", f"{self.read_seconds:.2f} s"),
            (peak, f"{format_bytes(self.peak_memory_bytes)} of {format_bytes(limit_bytes)}"),
            ("dense weights", format_bytes(self.dense_bytes)),
            ("expert slots", f"{self.num_slots:,} of {self.num_experts:,} ({format_bytes(self.slot_bytes)})"),
            ("I/O mode", f"{self.io} ({self.io_reason})" if self.io_reason else self.io),
        ]
        if self.gpu_memory_limit_bytes is not None:
            rows.append(("host memory", f"{format_bytes(self.host_bytes)} of {format_bytes(self.memory_limit_bytes)}"))
        rows += [("table rows read", f"{self.row_reads:,} ({format_bytes(self.row_bytes)})")] if self.row_reads else []
        rows += [("slow decode", self.slow_decode)] if self.slow_decode else []
        return rows + [("lossy", choice) for choice in self.lossy]


def table_html(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Return rows of text as an HTML table; the first cell of each row is its name."""
    left = ' style="text-align: left"'  # notebooks align cells to the right otherwise
    lines = ["".join(f"<th{left}>{escape(cell)}</th>" for cell in head)] if head else []
    lines += [
        f"<th{left}>{escape(row[0])}</th>" + "".join(f"<td{left}>{escape(cell)}</td>" for cell in row[1:])
        for row in rows
    ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def format_rate(rate: float) -> str:
    """Return a predicted rate with two significant digits, such as "160" or "5.8": predictions have no more."""
    rounded = float(f"{rate:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 or not rounded else f"{rounded:#.2g}"


def format_bytes(nbytes: float) -> str:
    """Return a human-readable size in powers of ten, such as "1.77 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"

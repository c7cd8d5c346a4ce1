"""plan(): predicts whether a model fits a memory limit, and how fast it is. Result types; planner.py computes them."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..experts.trace import RoutingTrace
from ..runtime.loading import limit_reason
from ..stats import format_bytes, format_rate, table_html
from .host_plan import LINK_US, HostPlan, hosts_table, plan_hosts
from .planner import Expectation, LimitPlan, Planner
from .presets import find
from .speed import Speed

SWEEP_POINTS = 10
NEARLY = 0.97
"""The best limit is the smallest one whose speed is at least this share of the highest."""


@dataclass(frozen=True)
class Plan:
    """Predicted memory use and speed of a model on this machine. Prints as tables, and as HTML in a notebook.

    Attributes:
        model: Path or repository.
        limit_bytes: The requested or default limit.
        at_limit: Prediction at this limit; None if the model doesn't fit.
        smallest_limit_bytes: Smallest limit that works.
        expert_bytes: Total size of all routed experts.
        num_experts: Total number of routed experts in all layers.
        num_experts_per_tok: K.
        record_bytes: Size of an expert in a slot, in the layer with the largest experts.
        max_context: Context length that memory is reserved for, in tokens.
        speed: Measured or given speed of the machine.
        sweep: Predictions at other limits, ascending, up to this machine's memory.
        assumptions: Assumptions behind the figures.
        host_limit_bytes: The limit on the host's memory, where ``limit_bytes`` is that of a GPU's own; else None.
        hosts: Predictions for several hosts that share the experts, if asked for.
        table_bytes: Size of lookup tables that stay in their files.
    """

    model: str
    limit_bytes: int
    at_limit: LimitPlan | None
    smallest_limit_bytes: int
    expert_bytes: int
    num_experts: int
    num_experts_per_tok: int
    record_bytes: int
    max_context: int
    speed: Speed
    sweep: tuple[LimitPlan, ...]
    assumptions: tuple[str, ...]
    host_limit_bytes: int | None = None
    hosts: tuple[HostPlan, ...] = ()
    table_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the model fits the limit, on one host or on one of the numbers of hosts."""
        return self.at_limit is not None or any(plan.budget is not None for plan in self.hosts)

    @property
    def best(self) -> LimitPlan | None:
        """The smallest limit of the sweep that is nearly as fast as the fastest, for the first routing listed."""
        rates = [point.expectations[0].tokens_per_second or 0.0 for point in self.sweep]
        hits = [point.expectations[0].hit_rate for point in self.sweep]
        values = rates if any(rates) else hits
        return next((p for p, value in zip(self.sweep, values, strict=True) if value >= NEARLY * max(values)), None)

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs in display order."""
        rows = [
            ("model", self.model),
            ("experts", f"{self.num_experts:,} of {format_bytes(self.record_bytes)}, "
             f"{format_bytes(self.expert_bytes)} in all; {self.num_experts_per_tok} a token and layer"),
            ("smallest limit", f"{format_bytes(self.smallest_limit_bytes)} for {self.max_context} tokens of context"),
        ]  # fmt: skip
        if self.table_bytes:
            rows.append(("lookup tables", f"{format_bytes(self.table_bytes)} stay in files, read by the row"))
        limit = "memory limit"
        if self.host_limit_bytes is not None:
            limit = "GPU memory limit"
            rows.append(("host memory limit", format_bytes(self.host_limit_bytes)))
        if self.at_limit is None:
            return [*rows, (limit, f"{format_bytes(self.limit_bytes)}: does not fit")]
        budget = self.at_limit.budget
        slots = self.at_limit.num_slots
        rows += [
            (limit, format_bytes(self.limit_bytes)),
            ("dense weights", format_bytes(budget.dense_bytes)),
            ("KV cache, states", format_bytes(budget.state_bytes)),
            ("scratch, buffers", format_bytes(budget.scratch_bytes + budget.buffer_bytes)),
            ("expert slots", f"{slots:,} of {self.num_experts:,} ({format_bytes(budget.slot_bytes)})"),
        ]
        return rows + [(f"{e.routing} routing", _expected(e)) for e in self.at_limit.expectations]

    def sweep_table(self) -> list[list[str]]:
        """Return the sweep as rows of cells, the first of which is the head."""
        rows = [["limit", "slots", *(f"{e.routing} routing" for e in self.sweep[0].expectations), ""]]
        for point in self.sweep:
            mark = "best" if point is self.best else ""
            figures = [f"{e.hit_rate:.0%}, {_tokens_per_second(e)}" for e in point.expectations]
            rows.append([format_bytes(point.limit_bytes), f"{point.num_slots:,}", *figures, mark])
        return rows

    def tables(self) -> list[list[list[str]]]:
        """Return the tables that follow the rows: of limits, and of numbers of hosts."""
        return [*([self.sweep_table()] if self.sweep else []), *([hosts_table(self.hosts)] if self.hosts else [])]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows()]
        for table in self.tables():
            widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
            lines += ["", *("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in table)]
        return "\n".join([*lines, "", *self.assumptions])

    def _repr_html_(self) -> str:
        tables = "".join(table_html(rows, head) for head, *rows in self.tables())
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.assumptions)
        return f"{table_html(self.rows())}{tables}<ul>{notes}</ul>"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible values."""
        best = self.best
        return {
            "model": self.model,
            "fits": self.fits,
            "limit_bytes": self.limit_bytes,
            "host_limit_bytes": self.host_limit_bytes,
            "smallest_limit_bytes": self.smallest_limit_bytes,
            "best_limit_bytes": best.limit_bytes if best else None,
            "expert_bytes": self.expert_bytes,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "record_bytes": self.record_bytes,
            "table_bytes": self.table_bytes,
            "max_context": self.max_context,
            "speed": asdict(self.speed),
            "at_limit": None if self.at_limit is None else _limit_dict(self.at_limit),
            "sweep": [_limit_dict(point) for point in self.sweep],
            "hosts": [plan.to_dict() for plan in self.hosts],
            "assumptions": list(self.assumptions),
        }


def _limit_dict(point: LimitPlan) -> dict[str, Any]:
    budget = point.budget
    return {
        "limit_bytes": point.limit_bytes,
        "dense_bytes": budget.dense_bytes,
        "state_bytes": budget.state_bytes,
        "scratch_bytes": budget.scratch_bytes,
        "buffer_bytes": budget.buffer_bytes,
        "slot_bytes": budget.slot_bytes,
        "num_slots": point.num_slots,
        "expectations": [asdict(expectation) for expectation in point.expectations],
    }


def _expected(expectation: Expectation) -> str:
    return (
        f"{_tokens_per_second(expectation)}, {expectation.hit_rate:.0%} of a token's experts in memory, "
        f"{format_bytes(expectation.missed_bytes)} read per token"
    )


def _tokens_per_second(expectation: Expectation) -> str:
    rate = expectation.tokens_per_second
    return "speed unknown" if rate is None else f"{format_rate(rate)} tok/s"


def plan(
    path_or_repo: str | Path,
    *,
    memory_limit: int | str | None = None,
    gpu_memory_limit: int | str | None = None,
    max_context: int = 8192,
    num_experts_per_tok: int | None = None,
    revision: str | None = None,
    trace: str | Path | RoutingTrace | None = None,
    disk_bytes_per_second: float | None = None,
    speed: Speed | None = None,
    trust_remote_code: bool = False,
    hosts: Sequence[int] = (),
    link_us: float = LINK_US,
) -> Plan:
    """Predict a model's memory use and speed on this machine from its headers, without reading any weights.

    Args:
        path_or_repo: Local directory, or a Hugging Face repository, of which only headers are downloaded, or a name
            that ``flash-moe models`` lists, which needs no network.
        memory_limit: Limit to plan for, in the form that :func:`load` takes; None for load's default.
        gpu_memory_limit: Limit on a GPU's own memory. The plan's figures are then about that memory.
        max_context: Context length to reserve memory for (prompt plus answer), in tokens.
        num_experts_per_tok: Override of the router's K.
        revision: Branch, tag or commit of the repository.
        trace: Recorded routing to predict the hit rate of, in addition to local and uniform routing.
        disk_bytes_per_second: Random-read rate of the disk. None probes the files of a local model for half a
            second; for a repository the rate is then unknown.
        speed: A machine's speed. None measures this machine, for a few seconds.
        trust_remote_code: Whether the checkpoint's own model file may be run; it must be in a local directory.
        hosts: Numbers of hosts that share the experts, each with this limit, to predict as well.
        link_us: Microseconds per message between two of these hosts.

    Returns:
        The plan, which says so if the model doesn't fit.

    Raises:
        CheckpointError: If the headers can't be downloaded or are unusable.
        RequestError: If an argument is invalid.
    """
    recorded = RoutingTrace.read(trace) if isinstance(trace, str | Path) else trace
    planner = Planner.open(
        path_or_repo,
        memory_limit=memory_limit,
        gpu_memory_limit=gpu_memory_limit,
        max_context=max_context,
        num_experts_per_tok=num_experts_per_tok,
        revision=revision,
        trace=recorded,
        disk_bytes_per_second=disk_bytes_per_second,
        speed=speed,
        trust_remote_code=trust_remote_code,
    )
    return Plan(
        model=os.fspath(path_or_repo),
        limit_bytes=planner.limit_bytes,
        at_limit=planner.at(planner.limit_bytes) if planner.limit_bytes >= planner.smallest_limit_bytes else None,
        smallest_limit_bytes=planner.smallest_limit_bytes,
        expert_bytes=planner.expert_bytes,
        num_experts=sum(planner.num_experts.values()),
        num_experts_per_tok=planner.k,
        record_bytes=max(planner.record_bytes.values()),
        max_context=max_context,
        speed=planner.speed,
        sweep=tuple(planner.at(limit) for limit in planner.limits(SWEEP_POINTS)),
        assumptions=(
            *_from_presets(path_or_repo),
            *([_of_packing(planner.expert_bytes)] if planner.must_be_packed else []),
            *_assumptions(planner.speed, None if memory_limit is not None else limit_reason()),
            *([_of_hosts(link_us)] if hosts else []),
        ),
        host_limit_bytes=planner.host_limit_bytes,
        hosts=tuple(plan_hosts(planner, count, link_us) for count in hosts),
        table_bytes=planner.table_bytes,
    )


def _from_presets(path_or_repo: str | Path) -> tuple[str, ...]:
    if isinstance(path_or_repo, Path) or not (preset := find(path_or_repo)) or path_or_repo != preset.name:
        return ()
    return (f"Dimensions are those that this package knows of {preset.repository}; nothing was downloaded.",)


def _of_packing(expert_bytes: int) -> str:
    return (
        'load refuses this checkpoint until "flash-moe pack SOURCE DESTINATION --bits unchanged" has rewritten it: '
        f"experts are in AWQ's or GPTQ's order. That reads and writes them once, {format_bytes(expert_bytes)} of disk; "
        "figures are those of the result."
    )


def _of_hosts(link_us: float) -> str:
    return (
        "Hosts: each has this limit, this machine's speed and a disk like it; experts are dealt out by number. A layer "
        f"waits for the host that reads most, and for 2 (N - 1) messages of {link_us:g} us."
    )


def _assumptions(speed: Speed, limit_reason: str | None) -> tuple[str, ...]:
    disk = speed.disk_bytes_per_second
    chosen = () if limit_reason is None else (f"The memory limit is {limit_reason}.",)
    return (
        *chosen,
        "Decode of one sequence, slots filled; prompts not counted. Reads come from the disk, not the page cache.",
        f"Weights pass through at {format_bytes(speed.weight_bytes_per_second)}/s, a layer's calls take "
        f"{1000 * speed.layer_seconds:.2f} ms, "
        + ("the disk's rate is not known." if disk is None else f"the disk gives {format_bytes(disk)}/s."),
        "Local routing: Zipf's law over half of the experts, a fifth of them kept from token to token; uniform: "
        "every expert equally likely, the worst case.",
    )

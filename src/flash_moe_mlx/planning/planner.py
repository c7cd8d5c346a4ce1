"""Computes plan()'s results for one model on one machine: the division of a limit, hit rate and speed."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import StreamingConfig
from ..errors import MemoryLimitError, RequestError
from ..experts.budget import Budget
from ..experts.trace import DECODE, RoutingTrace
from ..formats.checkpoint import Checkpoint
from ..formats.hub_headers import download_headers
from ..formats.places import local_directory
from ..machine import PROCESS_OVERHEAD_BYTES, usable_memory_bytes
from ..models.spec import ModelSpec
from ..models.table_rows import tables_of
from ..progress import report
from ..runtime.loading import choose_limits, inspect_checkpoint, plan_memory
from ..storage.disk_probe import probe_disk
from .presets import find, write_headers
from .simulation import replay
from .speed import Speed, TokenWork, measure_speed
from .synthetic_routing import LOCAL, UNIFORM, make_routing

_LAYERS, _TOKENS, _SKIPPED = 2, 320, 80  # of synthetic routing
_PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class Expectation:
    """Expected decode performance with one kind of routing.

    Attributes:
        routing: "local", "uniform" or "trace".
        hit_rate: Share of a token's experts that are in memory, once the slots are full.
        missed_bytes: Bytes read per token.
        tokens_per_second: Decode speed; None if the disk's rate is unknown.
    """

    routing: str
    hit_rate: float
    missed_bytes: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class LimitPlan:
    """A memory limit that works: its division and its expected performance."""

    limit_bytes: int
    budget: Budget
    expectations: tuple[Expectation, ...]

    @property
    def num_slots(self) -> int:
        """Total number of expert slots in all layers."""
        return sum(self.budget.num_slots.values())


class Planner:
    """Planner for one model, known from its headers, and one machine's speed.

    Attributes:
        limit_bytes: The requested limit, or load's default.
        smallest_limit_bytes: Smallest limit that works.
        record_bytes, payload_bytes: Size of an expert by layer, in a slot and as read.
        num_experts: E by layer.
        stored_dense_bytes: Stored size of all other tensors.
        k: Experts per token.
        speed: Speed of the machine.
        table_bytes: Stored size of lookup tables that stay in their files.
        must_be_packed: Whether `load` refuses the checkpoint until it is packed; figures are those of the result.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        config: StreamingConfig,
        speed: Speed,
        trace: RoutingTrace | None = None,
    ):
        """Store the values that `Planner.open` determines."""
        layers = checkpoint.moe_layers
        if trace is not None and set(trace.layers) != set(layers):
            raise RequestError(
                f"[plan] the trace must be of the model's {len(layers)} layers with experts, got {len(trace.layers)} "
                "layers. Record one with this model."
            )
        self._checkpoint, self._spec, self._config = checkpoint, spec, config
        self._trace = trace
        self.work = TokenWork.of(checkpoint, spec)
        self._made: dict[tuple[str, int], RoutingTrace] = {}
        self._hit_rates: dict[tuple[str, int, int], float] = {}
        self.speed = speed
        self.k = spec.num_experts_per_tok
        self.record_bytes = {layer: checkpoint.layout(layer).record_bytes for layer in layers}
        self.payload_bytes = {layer: checkpoint.layout(layer).payload_bytes for layer in layers}
        self.num_experts = {layer: checkpoint.num_experts(layer) for layer in layers}
        self.stored_dense_bytes = sum(info.nbytes for info in checkpoint.dense.values())
        self.table_bytes = sum(table.nbytes for table in tables_of(spec.model))
        self.must_be_packed = not checkpoint.is_streamable
        self.limit_bytes, self.host_limit_bytes = choose_limits(config)
        self.smallest_limit_bytes = self.smallest()

    @classmethod
    def open(
        cls,
        path_or_repo: str | Path,
        *,
        memory_limit: int | str | None = None,
        gpu_memory_limit: int | str | None = None,
        max_context: int = 8192,
        num_experts_per_tok: int | None = None,
        revision: str | None = None,
        trace: RoutingTrace | None = None,
        disk_bytes_per_second: float | None = None,
        speed: Speed | None = None,
        trust_remote_code: bool = False,
    ) -> "Planner":
        """Read headers and measure any speed that isn't given. Takes the arguments and raises the errors of `plan`."""
        config = StreamingConfig.from_arguments(
            memory_limit,
            max_context,
            num_experts_per_tok,
            "auto",
            trust_remote_code=trust_remote_code,
            gpu_memory_limit=gpu_memory_limit,
        )
        with _directory_of(path_or_repo, revision) as (directory, is_local):
            checkpoint, spec = inspect_checkpoint(directory, config)
            if speed is None:
                if disk_bytes_per_second is None and is_local:
                    record_bytes = min(checkpoint.layout(layer).payload_bytes for layer in checkpoint.moe_layers)
                    report("probing the disk")
                    probe = probe_disk(checkpoint.expert_files, record_bytes, seconds=_PROBE_SECONDS)
                    disk_bytes_per_second = probe.bytes_per_second if probe.is_plausible else None
                speed = measure_speed(disk_bytes_per_second)
            elif disk_bytes_per_second is not None:
                speed = replace(speed, disk_bytes_per_second=disk_bytes_per_second)
            return cls(checkpoint, spec, config, speed, trace)

    @property
    def expert_bytes(self) -> int:
        """Total stored size of all routed experts."""
        return sum(count * self.payload_bytes[layer] for layer, count in self.num_experts.items())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of routing to predict, in the order of display."""
        return ("local", "uniform") if self._trace is None else ("trace", "local", "uniform")

    def divide(self, limit_bytes: int, own: Mapping[int, int] | None = None) -> Budget:
        """Divide a limit as load does.

        Args:
            limit_bytes: The limit.
            own: Number of experts of each layer that this host reads; None for all.

        Raises:
            MemoryLimitError: If the limit is too small.
        """
        limits = limit_bytes, self.host_limit_bytes
        return plan_memory(self._checkpoint, self._spec, self._config, *limits, own, probe=False).budget

    def limits(self, count: int) -> list[int]:
        """Return limits from the smallest to this machine's memory, or to the limit at which all experts fit."""
        smallest = self.smallest_limit_bytes
        missing = ((self.num_experts[layer] - self._asked(layer)) * size for layer, size in self.record_bytes.items())
        most = smallest + sum(missing)
        top = max(min(most, max(usable_memory_bytes() - PROCESS_OVERHEAD_BYTES, self.limit_bytes)), smallest)
        return sorted({round(smallest + i * (top - smallest) / (count - 1)) for i in range(count)})

    def at(self, limit_bytes: int) -> LimitPlan:
        """Predict performance at a limit that works, for the trace (if any), local and uniform routing."""
        budget = self.divide(limit_bytes)
        return LimitPlan(limit_bytes, budget, tuple(self._expect(kind, budget.num_slots) for kind in self.kinds))

    def tokens_per_second(self, hit_rate: float) -> float | None:
        """Return the decode speed at a hit rate equal in all layers; None if the disk's rate is unknown."""
        return self._tokens_per_second(dict.fromkeys(self.num_experts, hit_rate))[1]

    def _asked(self, layer: int) -> int:
        return min(self.k, self.num_experts[layer])

    def smallest(self, own: Mapping[int, int] | None = None) -> int:
        """Return the smallest limit that works. Takes the argument of `divide`."""
        try:
            self.divide(1, own)
        except MemoryLimitError as error:
            if error.smallest_limit_bytes is not None:
                return error.smallest_limit_bytes
            raise
        return 1

    def _expect(self, kind: str, num_slots: Mapping[int, int]) -> Expectation:
        if kind == "trace" and self._trace is not None:
            found = replay(self._trace, num_slots)
            asked = found.hits[DECODE] + found.misses[DECODE]
            rates = dict(zip(found.layers, (found.hits[DECODE] / asked.clip(1)).tolist(), strict=True))
        else:
            rates = {layer: self._of_made(kind, self.num_experts[layer], slots) for layer, slots in num_slots.items()}
        hit_rate = sum(rate * self._asked(layer) for layer, rate in rates.items()) / sum(map(self._asked, rates))
        return Expectation(kind, hit_rate, *self._tokens_per_second(rates))

    def _tokens_per_second(self, rates: Mapping[int, float]) -> tuple[float, float | None]:
        """Return the bytes missed per token and the tokens per second."""
        missed = sum((1 - r) * self._asked(layer) * self.payload_bytes[layer] for layer, r in rates.items())
        seconds = self.speed.token_seconds(self.work, missed)
        return missed, None if seconds is None else 1 / seconds

    def _of_made(self, kind: str, experts: int, slots: int) -> float:
        """Return the hit rate of synthetic routing."""
        if slots >= experts:
            return 1.0
        key = (kind, experts, slots)
        if key not in self._hit_rates:
            made = self.routing(kind, experts)
            self._hit_rates[key] = replay(made, slots, skip_passes=_SKIPPED).decode_hit_rate
        return self._hit_rates[key]

    def routing(self, kind: str, experts: int) -> RoutingTrace:
        """Return the recorded routing, or synthetic routing of that kind over so many experts."""
        if kind == "trace" and self._trace is not None:
            return self._trace
        if (kind, experts) not in self._made:
            self._made[kind, experts] = make_routing(
                LOCAL if kind == "local" else UNIFORM,
                layers=_LAYERS,
                num_experts=experts,
                num_experts_per_tok=min(self.k, experts),
                tokens=_TOKENS,
            )
        return self._made[kind, experts]


def local_hit_rate(num_experts: int, num_experts_per_tok: int, slots: int) -> float:
    """Return the hit rate of synthetic local routing with this many slots per layer."""
    if slots >= num_experts:
        return 1.0
    made = make_routing(
        LOCAL, layers=_LAYERS, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, tokens=_TOKENS
    )
    return replay(made, slots, skip_passes=_SKIPPED).decode_hit_rate


@contextmanager
def _directory_of(path_or_repo: str | Path, revision: str | None) -> Iterator[tuple[Path, bool]]:
    """Return the directory of the headers, and whether it also contains the weights."""
    known = None if os.path.exists(path_or_repo) or isinstance(path_or_repo, Path) else find(path_or_repo)
    if known is None and (path := local_directory(path_or_repo, "plan")) is not None:
        yield path, True
        return
    with tempfile.TemporaryDirectory(prefix="flash-moe-") as directory:
        if known is not None and path_or_repo == known.name:
            write_headers(known.config, known.bits, Path(directory))
            yield Path(directory), False
            return
        download_headers(str(path_or_repo), Path(directory), revision)
        yield Path(directory), False

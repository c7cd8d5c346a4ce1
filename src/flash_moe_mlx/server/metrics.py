"""Metrics of a running server: one table of names, rendered for Prometheus and as JSON for the status page."""

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..runtime.generation import GenerationResponse

PREFIX = "flash_moe_"
FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass
class Metrics:
    """Counts since the server started. Each is written by one thread and may be read by any.

    Attributes:
        requests: Number of answers by (path, status); 499 means that the client left.
        prompt_tokens, cached_tokens, generated_tokens: Tokens of generations that have begun; prompt tokens include
            cached ones.
        generation_seconds: Time from each answer's first token to its last so far.
        tokens_per_second: Decode speed of the latest generation so far.
        first_token_seconds: Sum of the times from a request's arrival to its first token.
        first_tokens: Number of those times in each bucket; the last bucket has no upper bound.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    tokens_per_second: float = 0.0
    first_token_seconds: float = 0.0
    first_tokens: list[int] = field(default_factory=lambda: [0] * (len(FIRST_TOKEN_BUCKETS) + 1))

    def first_token(self, response: GenerationResponse, arrived: float) -> None:
        """Note an answer's first token. ``arrived`` is on `time.perf_counter`'s clock."""
        seconds = time.perf_counter() - arrived
        self.prompt_tokens += response.prompt_tokens
        self.cached_tokens += response.cached_tokens
        self.first_token_seconds += seconds
        self.first_tokens[bisect_left(FIRST_TOKEN_BUCKETS, seconds)] += 1

    def token(self, response: GenerationResponse, seconds: float) -> None:
        """Note a token, the first one included, that came ``seconds`` after the previous one."""
        self.generated_tokens += 1
        self.generation_seconds += seconds
        self.tokens_per_second = response.generation_tps


_Reader = Callable[[Metrics, Any, Any], float]

# name, type, help, value of (metrics, model, worker)
_TABLE: list[tuple[str, str, str, _Reader]] = [
    ("queued_requests", "gauge", "Requests that wait for their turn.", lambda m, model, w: w.queued),
    ("running_requests", "gauge", "Generations under way.", lambda m, model, w: w.running),
    ("prompt_tokens_total", "counter", "Tokens of prompts, cached ones included.", lambda m, model, w: m.prompt_tokens),
    ("cached_prompt_tokens_total", "counter", "Tokens of prompts that the prefix cache spared.",
     lambda m, model, w: m.cached_tokens),
    ("answers_total", "counter", "Answers that have begun.", lambda m, model, w: sum(m.first_tokens)),
    ("generated_tokens_total", "counter", "Tokens generated.", lambda m, model, w: m.generated_tokens),
    ("generation_seconds_total", "counter", "Seconds spent on tokens after an answer's first.",
     lambda m, model, w: m.generation_seconds),
    ("tokens_per_second", "gauge", "Decode speed of the latest generation.", lambda m, model, w: m.tokens_per_second),
    ("expert_hits_total", "counter", "Experts asked for that were in memory.",
     lambda m, model, w: model.streaming.counters.hits),
    ("expert_misses_total", "counter", "Experts asked for that were read.",
     lambda m, model, w: model.streaming.counters.misses),
    ("expert_hit_rate", "gauge", "Share of the experts asked for that were in memory, since the start.",
     lambda m, model, w: model.streaming.counters.hit_rate),
    ("expert_read_bytes_total", "counter", "Expert bytes read from storage.",
     lambda m, model, w: model.streaming.counters.bytes_read),
    ("expert_read_wait_seconds_total", "counter", "Seconds that the model waited for experts.",
     lambda m, model, w: model.streaming.counters.read_seconds),
    ("memory_limit_bytes", "gauge", "The model's memory limit.", lambda m, model, w: w.stats.memory_limit_bytes),
    ("peak_memory_bytes", "gauge", "Most memory in use by MLX and the engine.",
     lambda m, model, w: w.stats.peak_memory_bytes),
    ("dense_bytes", "gauge", "Memory of the dense weights.", lambda m, model, w: w.stats.dense_bytes),
    ("expert_slot_bytes", "gauge", "Memory of the expert slots.", lambda m, model, w: w.stats.slot_bytes),
    ("prefix_cache_bytes", "gauge", "Memory of the states that are kept.", lambda m, model, w: w.prefix_cache_bytes),
]  # fmt: skip


def values(metrics: Metrics, model: Any, worker: Any) -> dict[str, float]:
    """Return every metric without labels, by name. JSON has no NaN, so undefined values are 0."""
    figures = {name: read(metrics, model, worker) for name, _, _, read in _TABLE}
    return {name: value if math.isfinite(value) else 0.0 for name, value in figures.items()}


def prometheus(metrics: Metrics, model: Any, worker: Any) -> str:
    """Render the metrics in Prometheus' text format 0.0.4."""
    return "\n".join(_lines(metrics, model, worker)) + "\n"


def _lines(metrics: Metrics, model: Any, worker: Any) -> Iterator[str]:
    for name, kind, text, read in _TABLE:
        yield from _head(name, kind, text)
        yield f"{PREFIX}{name} {read(metrics, model, worker)}"
    yield from _head("requests_total", "counter", "Answers by path and status; 499 is a client that left.")
    for (path, status), count in sorted(metrics.requests.items()):
        yield f'{PREFIX}requests_total{{path="{path}",status="{status}"}} {count}'
    name = "time_to_first_token_seconds"
    yield from _head(name, "histogram", "From a request's arrival to its first token, queue included.")
    total = 0
    for bound, count in zip((*FIRST_TOKEN_BUCKETS, "+Inf"), metrics.first_tokens, strict=True):
        total += count
        yield f'{PREFIX}{name}_bucket{{le="{bound}"}} {total}'
    yield f"{PREFIX}{name}_sum {metrics.first_token_seconds}"
    yield f"{PREFIX}{name}_count {total}"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"

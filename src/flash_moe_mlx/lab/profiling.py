"""profile(): measures where forward passes spend time, by waiting for each part before the next starts."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.layers import Embedding
from ..models.moe_block import StreamingMoE
from ..models.switch_glu import StreamingSwitchGLU
from ..stats import table_html

PHASES = ("attention", "router", "shared expert", "I/O wait", "experts", "lm_head", "other")

# Modules by the last component of their path; nested modules count for the innermost.
_PHASE_OF_NAME = {
    "self_attn": "attention", "linear_attn": "attention", "attention": "attention", "attn": "attention",
    "gate": "router", "router": "router", "shared_expert": "shared expert", "shared_experts": "shared expert",
    "lm_head": "lm_head",
}  # fmt: skip


@dataclass
class Profile:
    """Seconds by phase of the work done within `profile`. Prints as a table, and as HTML in a notebook.

    Attributes:
        prefill, decode: Seconds in each of PHASES, in passes of several tokens per sequence and of one.
        prefill_tokens, decode_tokens: Tokens of those passes.
    """

    prefill: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    decode: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    prefill_tokens: int = 0
    decode_tokens: int = 0

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (phase, milliseconds per token in prefill, in decode), and the sum."""
        names = [*PHASES, "all"]
        columns = []
        for seconds, tokens in ((self.prefill, self.prefill_tokens), (self.decode, self.decode_tokens)):
            total = sum(seconds.values())
            values = [*seconds.values(), total]
            columns.append([f"{1e3 * v / tokens:.2f} ({v / total:.0%})" if tokens else "-" for v in values])
        return list(zip(names, *columns, strict=True))

    def _head(self) -> tuple[str, str, str]:
        return "ms per token", f"prefill ({self.prefill_tokens})", f"decode ({self.decode_tokens})"

    def __str__(self) -> str:
        table = [self._head(), *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in table)

    def _repr_html_(self) -> str:
        return table_html(self.rows(), self._head())


@contextmanager
def profile(model: Any) -> Iterator[Profile]:
    """Measure where this model's forward passes spend time, in one thread.

    Waits for each part before the next starts, and turns off the decoder that runs several parts in one call. Both
    cost time, so rely on the shares, not the speeds. Work outside the named phases, such as norms, counts as
    "other".

    Args:
        model: A model that `load` returned.

    Yields:
        The profile, which is updated while the model runs.

    Example:
        >>> with profile(model) as seconds:
        ...     generate(model, tokenizer, "Hello")
        >>> print(seconds)
    """
    clock = _Clock(model)
    changed: list[tuple[nn.Module, type]] = []
    try:
        for path, module in model.named_modules():
            if phase := _phase(path, module):
                changed.append((module, type(module)))
                module.__class__ = _timed(type(module), phase, clock)
        yield clock.profile
    finally:
        for module, own in changed:
            module.__class__ = own


def _phase(path: str, module: nn.Module) -> str | None:
    if not path:
        return "other"  # the model itself
    if isinstance(module, StreamingMoE | StreamingSwitchGLU):
        return "experts"
    if isinstance(module, Embedding):  # called if it is also the output projection
        return "lm_head"
    return _PHASE_OF_NAME.get(path.rpartition(".")[2])


class _Clock:
    """A clock that adds up each call's time, excluding nested calls."""

    def __init__(self, model: Any):
        self.profile = Profile()
        self._counters = model.streaming.counters
        self._within: list[list[float]] = []  # seconds and waiting time of nested calls, per active call
        self._seconds: dict[str, float] = defaultdict(float)

    def run(self, phase: str, call: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        mx.eval([value for value in inputs if isinstance(value, mx.array)])
        self._within.append([0.0, 0.0])
        started, waited = time.perf_counter(), self._counters.read_seconds
        try:
            output = call(*inputs, **options)
            mx.eval(output)
        finally:
            seconds, waiting = time.perf_counter() - started, self._counters.read_seconds - waited
            inner_seconds, inner_waiting = self._within.pop()
            self._seconds["I/O wait"] += waiting - inner_waiting
            self._seconds[phase] += seconds - inner_seconds - (waiting - inner_waiting)
            if self._within:
                self._within[-1][0] += seconds
                self._within[-1][1] += waiting
        if not self._within:
            self._end_pass(inputs[0].shape if inputs else (1, 1))
        return output

    def _end_pass(self, shape: tuple[int, ...]) -> None:
        is_decode = shape[1] == 1
        kept = self.profile.decode if is_decode else self.profile.prefill
        for phase, seconds in self._seconds.items():
            kept[phase] += seconds
        self._seconds.clear()
        if is_decode:
            self.profile.decode_tokens += shape[0]
        else:
            self.profile.prefill_tokens += shape[0] * shape[1]


def _timed(cls: type, phase: str, clock: _Clock) -> type:
    """Return a subclass whose calls are timed."""

    def __call__(self: Any, *inputs: Any, **options: Any) -> Any:
        return clock.run(phase, lambda *a, **o: cls.__call__(self, *a, **o), inputs, options)

    members = {"__call__": __call__, "__module__": cls.__module__, "_decoder": lambda _: None}
    return type(cls.__name__, (cls,), members)

"""Steps: the forward passes of one generation, and what they share with other generations that are run together."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from ..experts.leading import Leader
from ..experts.thread_streams import borrow_stream
from ..models.caches import pending_states
from ..models.checks import check_sampled, lazily_finite
from ..ops.gpu.kernel_source import explain_refusals
from .constraint import Constraint
from .prefix_cache import PrefixCache

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass
class Snapshots:
    """One generation's use of a prefix cache: tokens it saved, and points still to be snapshotted, ascending."""

    cache: PrefixCache
    cached: int
    points: list[int]


class Step(NamedTuple):
    """A token being computed: its id, its log-probabilities, whether the logits are finite, and its input."""

    token: mx.array
    logprobs: mx.array
    finite: mx.array | None
    fed: mx.array
    embeddings: mx.array | None


class Steps:
    """Forward passes of one generation: the prompt in chunks, then one token at a time.

    Attributes:
        reading: Whether the prompt is still being read.
        due: The token to be fed next, shape (1,), while the generation waits for that pass.
        alone: Whether no other generation runs, so that the next token may be built ahead.
    """

    def __init__(
        self,
        model: Any,
        caches: list[Any],
        sampler: Sampler,
        processors: list[LogitsProcessor],
        quantize_caches: Callable[[], None],
    ):
        self.model = model
        self.reading = True
        self.due: mx.array | None = None
        self.alone = True
        self._caches = caches
        self._extract: Callable[[], list[Any]] | None = None
        self._logits: mx.array | None = None
        self._sampler = sampler
        # Constraints come last, and need no history: keeping one costs an operation per token.
        self._constraints = [p for p in processors if isinstance(p, Constraint)]
        self._processors = [p for p in processors if not isinstance(p, Constraint)]
        self._quantize_caches = quantize_caches
        self._seen: mx.array | None = None
        self._leader: Leader | None = None
        self._number = 0

    @property
    def caches(self) -> list[Any]:
        """The caches; copies of them while they are part of a batch's."""
        return self._caches if self._extract is None else self._extract()

    @property
    def mergeable(self) -> bool:
        """Whether the caches may become part of a batch's; quantised ones may not."""
        return all(hasattr(cache, "merge") for cache in self._caches)

    def lend(self, extract: Callable[[], list[Any]]) -> list[Any]:
        """Give the caches away to become part of a batch's, out of which ``extract`` copies them."""
        self._extract, caches = extract, self._caches.copy()
        self._caches.clear()
        return caches

    def take_back(self, caches: list[Any]) -> None:
        """Own these caches again, which hold the same tokens."""
        self._caches[:], self._extract = caches, None

    def expect(self, logits: mx.array) -> None:
        """Use the logits of a batch's pass, shape (1, vocabulary), in place of the next pass."""
        self._logits = logits

    def lead(
        self, tokens: list[int], prefix_cache: PrefixCache | None, max_kv_size: int | None, kv: tuple[int, int, Any]
    ) -> None:
        """Announce this generation to the ranks that follow, and later each of its passes."""
        leader: Leader = self.model.streaming.leader
        self._leader, self._number = leader, leader.number(self)
        prefix = None if prefix_cache is None else prefix_cache.number
        with self._announced("begin", tokens=tokens, prefix=prefix, max_kv_size=max_kv_size, kv=kv):
            pass

    def _announced(self, op: str, **fields: Any) -> AbstractContextManager[None]:
        return nullcontext() if self._leader is None else self._leader.announced(op, number=self._number, **fields)

    def _feeding(self, op: str, tokens: mx.array) -> AbstractContextManager[None]:
        return nullcontext() if self._leader is None else self._announced(op, tokens=tokens.tolist())

    def snapshot(self, cache: PrefixCache, tokens: list[int], *, lasting: bool = False) -> None:
        """Store a copy of the caches, which hold exactly ``tokens``; a ``lasting`` one in the cache's directory too."""
        with self._announced("store", prefix=cache.number, tokens=tokens):
            cache.store(tokens, self.caches, lasting=lasting)

    def note(self, tokens: mx.array) -> None:
        """Append tokens to the history that logits processors receive."""
        if self._processors and len(tokens):
            self._seen = tokens if self._seen is None else mx.concatenate([self._seen, tokens])

    @explain_refusals()
    def prefill(self, tokens: mx.array, embeddings: mx.array | None) -> None:
        """Advance the caches by a chunk of the prompt; no logits are computed."""
        borrow_stream()
        with self._feeding("prefill", tokens):
            self.model(tokens[None], cache=self.caches, input_embeddings=batched(embeddings), logits_to_keep=0)
        self.note(tokens)
        self._quantize_caches()
        mx.eval(pending_states(self._caches), self._seen)
        mx.clear_cache()

    @property
    def run_ahead(self) -> bool:
        """Whether the next token may be built while the current one is computed, which takes lazy passes."""
        return self.alone and not self._constraints and bool(getattr(self.model, "runs_ahead", False))

    def advance(self, token: int) -> None:
        """Let constraints compute what may follow a token; call it before :meth:`start` with that token."""
        for constraint in self._constraints:
            constraint.advance(token)

    @explain_refusals()
    def start(self, tokens: mx.array, embeddings: mx.array | None = None) -> Step:
        """Feed tokens and start computing the next one."""
        borrow_stream()
        logits, self._logits = self._logits, None
        if logits is None:
            given = batched(embeddings)
            with self._feeding("start", tokens):
                logits = self.model(tokens[None], cache=self.caches, input_embeddings=given, logits_to_keep=1)[:, -1, :]
        self.note(tokens)
        finite = lazily_finite(logits)  # before processors: they may exclude tokens with -inf
        for processor in self._processors:
            logits = processor(self._seen, logits)
        for constraint in self._constraints:
            logits = constraint(tokens, logits)
        self._quantize_caches()
        # Always in float32: samplers sum as many probabilities as the vocabulary has entries.
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        token, logprobs = self.model.streaming.agreed(self._sampler(logprobs)), logprobs.squeeze(0)
        # Start everything that outlives the step: only this thread could evaluate it later if it stayed lazy.
        mx.async_eval(token, logprobs, pending_states(self._caches), self._seen, finite)
        return Step(token, logprobs, finite, tokens, embeddings)

    @explain_refusals()
    def finish(self, step: Step) -> tuple[mx.array, mx.array]:
        """Wait for a step and return the next token (1,) and its log-probabilities (vocabulary,), float32."""
        mx.eval(step.token, step.logprobs, step.finite)
        if not self.run_ahead:
            mx.eval(pending_states(self._caches), self._seen)
        if step.finite is not None and not step.finite.item():
            with self._announced("diagnose"):
                raise self.model.diagnose(step.fed[None], batched(step.embeddings))
        check_sampled(step.token, step.logprobs.shape[-1])
        return step.token, step.logprobs


def batched(embeddings: mx.array | None) -> mx.array | None:
    """Return embeddings as a batch of one sequence."""
    return None if embeddings is None else embeddings[None]

"""generate() and stream_generate(): mlx_lm's signatures and fields, with a loop suited to eager streaming.

mlx_lm computes token n+1 before it yields token n, which hides latency where evaluation is lazy. Reading the router's
choice on the host makes evaluation eager, so here a token is yielded before the next one is computed.
"""

import logging
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse as MlxGenerationResponse
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import DEFAULT_PREFILL_STEP_SIZE
from ..errors import RequestError
from ..experts.thread_streams import borrow_stream
from ..forks import check_process
from ..models.caches import context_length
from ..progress import Report, report, showing
from ..stats import GenerationStats
from .constraint import Constraint
from .grammar import as_grammar
from .prefix_cache import PrefixCache
from .prompt_text import check_length, check_text
from .steps import LogitsProcessor, Sampler, Snapshots, Steps

logger = logging.getLogger(__name__)


@dataclass
class GenerationResponse(MlxGenerationResponse):
    """mlx_lm's response, extended by the streaming figures of this generation so far.

    Attributes:
        streaming: Hit rate, bytes read and I/O wait since the generation began.
        cached_tokens: Number of prompt tokens taken from a prefix cache; the others were prefilled.
    """

    streaming: GenerationStats = field(default_factory=GenerationStats)
    cached_tokens: int = 0


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    *,
    sampler: Sampler | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: mx.array | None = None,
    prefix_cache: PrefixCache | None = None,
    snapshot_at: Sequence[int] | None = None,
    schema: Any = None,
    progress: bool | Report = True,
) -> Generator[GenerationResponse, None, None]:
    """Generate text, one response per token. Takes the arguments of :func:`mlx_lm.stream_generate`.

    The iterator may be advanced from different threads in turn, and so may the caches.

    Args:
        model: The model that :func:`flash_moe_mlx.load` returned.
        tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned, or any transformers tokenizer.
        prompt: Text, or token ids.
        max_tokens: Maximum number of tokens to generate; -1 continues until an end token or max_context.
        sampler: Function from log-probabilities (1, vocabulary) to a token id (1,); greedy by default.
        logits_processors: Functions of (tokens so far, logits) that return logits.
        max_kv_size: Accepted for compatibility with mlx_lm; ignored by models that create their own caches.
        prompt_cache: Caches of the conversation so far, advanced in place. When generation ends they hold the prompt
            and every yielded token, as in mlx_lm; if the iterator is closed early, all but the last token.
            Their states take memory from the expert slots for as long as anything holds the caches.
        prefill_step_size: Prompt tokens per forward pass. The exact bits depend on it, but never on the memory limit.
        kv_bits: Quantise the KV cache to this many bits (lossy).
        kv_group_size: Group size of a quantised KV cache.
        quantized_kv_start: Tokens after which the KV cache is quantised.
        prompt_progress_callback: Called with (prompt tokens processed, prompt tokens).
        input_embeddings: Embeddings to use instead of the prompt's own. Shape (L, H).
        prefix_cache: Prefix cache to resume from: the longest stored prefix of the prompt is reused, and new
            snapshots are stored at ``snapshot_at`` and after the answer.
        snapshot_at: Prompt positions to snapshot, as :func:`flash_moe_mlx.chat_prompt` returns them; None takes a
            snapshot at the prompt's end.
        schema: JSON schema that the answer obeys: a mapping, JSON text or a pydantic model; or a :class:`Grammar`.
            Thinking stays free. If ``finish_reason`` is "length", the answer was cut and is not complete. Needs
            llguidance: ``pip install 'flash_moe_mlx[schema]'``.
        progress: True shows what the first token waits for if that takes long: one line on a terminal's stderr, a bar
            in a notebook, nothing elsewhere. A function receives each `Progress`. False shows nothing.

    Yields:
        Responses with mlx_lm's fields and ``.streaming``.

    Raises:
        RequestError: If the prompt is empty or longer than max_context, if max_tokens is neither positive nor -1, if
            prefix_cache belongs to another model or is combined with options that exclude it, or if llguidance can't
            compile the schema.
        MemoryLimitError: If the limit can't hold a forward pass of this size.
        StoreError: If an expert can't be read, or this process was forked from the one that loaded the model.
    """
    answer = begin_answer(
        model,
        tokenizer,
        prompt,
        max_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        max_kv_size=max_kv_size,
        prompt_cache=prompt_cache,
        prefill_step_size=prefill_step_size,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
        prompt_progress_callback=prompt_progress_callback,
        input_embeddings=input_embeddings,
        prefix_cache=prefix_cache,
        snapshot_at=snapshot_at,
        schema=schema,
    )
    return _showing_first(_responses(answer.passes), progress)


@dataclass(eq=False)
class Answer:
    """A generation that is advanced one pass at a time.

    Attributes:
        steps: Its passes.
        passes: Advances it: yields None before each pass, and the response of each token.
    """

    steps: Steps
    passes: Generator[GenerationResponse | None, None, None]


def begin_answer(
    model: Any,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    *,
    sampler: Sampler | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: mx.array | None = None,
    prefix_cache: PrefixCache | None = None,
    snapshot_at: Sequence[int] | None = None,
    schema: Any = None,
) -> Answer:
    """Check the arguments of :func:`stream_generate`, which raises the same, and return the generation to advance."""
    check_process("generate")
    borrow_stream()
    if not isinstance(max_tokens, int) or max_tokens < -1 or max_tokens == 0:
        raise RequestError(f"[max_tokens] must be at least 1, or -1 for no limit, got {max_tokens!r}. Choose one.")
    if not isinstance(prefill_step_size, int) or prefill_step_size < 1:
        raise RequestError(
            f"[prefill_step_size] must be at least 1 token, got {prefill_step_size!r}. Leave it out for "
            f"{DEFAULT_PREFILL_STEP_SIZE}."
        )
    tokenizer = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    tokens = _encode(tokenizer, prompt, model)
    length = len(tokens) if input_embeddings is None else len(input_embeddings)
    if input_embeddings is not None and (input_embeddings.ndim != 2 or len(tokens) not in (0, length)):
        raise RequestError(
            f"[input_embeddings] must have shape ({len(tokens) or 'L'}, H), got {input_embeddings.shape}. "
            "Pass one row per token of the prompt, or an empty prompt."
        )
    mx.eval(tokens, input_embeddings)  # evaluated here, because the thread that generates may be another one
    cached = 0
    if prefix_cache is not None:
        if prefix_cache.model is not model:
            raise RequestError("[prefix_cache] must be of this model, got another's. Make one for each model.")
        if not all(x is None for x in (prompt_cache, kv_bits, max_kv_size, input_embeddings)):
            raise RequestError(
                "[prefix_cache] must come without prompt_cache, kv_bits, max_kv_size and input_embeddings, got one of "
                "them. Leave it out."
            )
        caches, cached = prefix_cache.fetch(tokens.tolist())
    else:
        caches = make_prompt_cache(model, max_kv_size) if prompt_cache is None else prompt_cache
    context = length + (context_length(caches) if prefix_cache is None else 0)
    limit = model.streaming.max_context
    if length == 0:
        raise RequestError("[prompt] must have at least one token, got none. Pass a non-empty prompt.")
    if context > limit:
        raise RequestError(
            f"[prompt] must leave the context at most max_context = {limit} tokens, got {context}. Shorten it, or "
            "load with a larger max_context."
        )
    processors = list(logits_processors or [])
    if schema is not None:
        processors.append(Constraint(tokenizer, as_grammar(schema), tokens.tolist(), model.vocabulary_size))
    # The last token needs no room in the cache: it is never fed back.
    room = limit - context + 1
    kv = quantized_kv_start, kv_group_size, kv_bits
    steps = Steps(
        model,
        caches,
        sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1)),
        processors,
        lambda: maybe_quantize_kv_cache(caches, *kv),
    )
    if model.streaming.leader is not None:
        if prompt_cache is not None or input_embeddings is not None:
            raise RequestError(
                "[generate] prompt_cache and input_embeddings must be left out where rank 0 leads the others, got one "
                "of them. Run the same program on every rank to use them."
            )
        steps.lead(tokens.tolist(), prefix_cache, max_kv_size, kv)
    passes = _passes(
        steps,
        tokenizer,
        tokens,
        input_embeddings,
        room if max_tokens < 0 else min(max_tokens, room),
        prefill_step_size,
        prompt_progress_callback or (lambda *_: None),
        room if prompt_cache is not None else 0,
        None
        if prefix_cache is None
        else Snapshots(prefix_cache, cached, prefix_cache.points(snapshot_at, cached, length)),
    )
    return Answer(steps, passes)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generate a complete answer. Takes the arguments of :func:`mlx_lm.generate` and :func:`stream_generate`.

    Args:
        model: The model that :func:`flash_moe_mlx.load` returned.
        tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
        prompt: Text, or token ids.
        verbose: Print the text as it is generated, then the figures.
        **kwargs: Passed to :func:`stream_generate`.

    Returns:
        The generated text.
    """
    text, response = "", None
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print(
            f"\n{response.prompt_tokens} prompt tokens, {response.prompt_tps:.1f} tok/s; "
            f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tok/s; "
            f"hit rate {response.streaming.hit_rate:.1%}, {response.streaming.bytes_read / 1e6:.1f} MB read, "
            f"peak memory {response.peak_memory:.3f} GB",
            file=sys.stdout,
        )
    return text


def _encode(tokenizer: TokenizerWrapper, prompt: str | mx.array | list[int], model: Any) -> mx.array:
    if isinstance(prompt, str):
        check_text(prompt)
        check_length(tokenizer, prompt, model.streaming.max_context)
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    try:
        ids = np.asarray(prompt)
    except (ValueError, RuntimeError):  # rows of different lengths, or a dtype that numpy doesn't have
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        got = f"shape {ids.shape} of {ids.dtype}" if ids.ndim else type(prompt).__name__
        advice = "Encode it first."
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            advice = "Use tokenizer.apply_chat_template(messages, add_generation_prompt=True)."
        raise RequestError(f"[prompt] must be text or token ids of shape (L,), got {got}. {advice}")
    size = model.vocabulary_size
    # Out of range, MLX would read memory beyond the embeddings.
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        raise RequestError(
            f"[prompt] token ids must be from 0 to {size - 1}, got {ids.min()} to {ids.max()}. "
            "Use the model's own tokenizer."
        )
    return mx.array(ids.astype(np.uint32))


def _responses(
    passes: Generator[GenerationResponse | None, None, None],
) -> Generator[GenerationResponse, None, None]:
    """Run every pass at once, and yield the responses."""
    with closing(passes):
        yield from (response for response in passes if response is not None)


def _showing_first(
    responses: Generator[GenerationResponse, None, None], progress: bool | Report
) -> Generator[GenerationResponse, None, None]:
    """Yield the responses, and show what the first one waits for."""
    with closing(responses):
        with showing(progress):
            first = next(responses)
        yield first
        yield from responses


def _passes(
    steps: Steps,
    tokenizer: TokenizerWrapper,
    prompt: mx.array,
    embeddings: mx.array | None,
    max_tokens: int,
    prefill_step_size: int,
    progress: Callable[[int, int], None],
    room_to_keep: int,
    snapshots: Snapshots | None,
) -> Generator[GenerationResponse | None, None, None]:
    before = steps.model.streaming.counters.copy()
    detokenizer = tokenizer.detokenizer
    length = len(prompt) if embeddings is None else len(embeddings)
    started = time.perf_counter()
    done = cached = snapshots.cached if snapshots is not None else 0
    if cached:
        steps.note(prompt[:cached])
    progress(done, length)
    report("reading the prompt", done, length, "tokens")
    points = list(snapshots.points) if snapshots is not None else []
    # As in mlx_lm, the last prompt token is fed alone: the chunks before it need no logits.
    while length - done > 1:
        yield None
        size = min(prefill_step_size, *(point - done for point in points[:1]), length - done - 1)
        steps.prefill(prompt[done : done + size], _part(embeddings, done, size))
        done += size
        if snapshots is not None and points[:1] == [done]:
            steps.snapshot(snapshots.cache, prompt[: points.pop(0)].tolist(), lasting=True)
        progress(done, length)
        report("reading the prompt", done, length, "tokens")
    yield None
    step = steps.start(prompt[done:], _part(embeddings, done, 1))
    steps.reading = False
    prompt_tps = 0.0
    fed: list[int] = []
    for count in range(1, max_tokens + 1):
        # Where passes are lazy, the next token is built while this one runs.
        following = steps.start(step.token) if steps.run_ahead and count < max_tokens else None
        token, logprobs = steps.finish(step)
        if count == 1:
            progress(length, length)
            prompt_tps = (length - cached) / (time.perf_counter() - started)
            started = time.perf_counter()
        token_id = token.item()
        ended = token_id in tokenizer.eos_token_ids
        if not ended:
            detokenizer.add_token(token_id)
        last = ended or count == max_tokens
        if last:
            detokenizer.finalize()
            # The caller's caches continue the conversation, so they must hold the last token, even an end token.
            if following is not None:
                fed.append(token_id)
            elif count < room_to_keep:
                steps.prefill(token, None)
            if snapshots is not None:
                steps.snapshot(snapshots.cache, [*prompt.tolist(), *fed])
        streaming = GenerationStats.from_counters(steps.model.streaming.counters.since(before))
        if last:
            figures = (length, cached, count, streaming.hit_rate, streaming.bytes_read)
            logger.debug("%d prompt tokens (%d cached), %d tokens; hit rate %.3f, %d bytes read", *figures)
        yield GenerationResponse(
            text=detokenizer.last_segment,
            token=token_id,
            logprobs=logprobs,
            from_draft=False,
            prompt_tokens=length,
            prompt_tps=prompt_tps,
            generation_tokens=count,
            generation_tps=count / (time.perf_counter() - started),
            peak_memory=steps.model.streaming.peak_memory_bytes / 1e9,
            finish_reason=("stop" if ended else "length") if last else None,
            streaming=streaming,
            cached_tokens=cached,
        )
        if last:
            return
        if following is None:
            steps.advance(token_id)
            steps.due = token
        yield None
        steps.due = None
        step = following or steps.start(token)
        fed.append(token_id)


def _part(embeddings: mx.array | None, start: int, size: int) -> mx.array | None:
    return None if embeddings is None else embeddings[start : start + size]

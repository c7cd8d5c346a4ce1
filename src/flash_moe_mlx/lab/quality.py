"""quality(): perplexity of a checkpoint on a text, and how far its predictions are from another checkpoint's.

One model is loaded at a time, so that a memory limit that can run either can compare both. The logits of a few windows
are kept in a temporary file of bounded size, exactly, until the other model has scored the same windows.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import parse_size
from ..errors import RequestError
from ..formats.places import local_directory
from ..progress import Report, showing
from ..runtime.prompt_text import check_text
from ..stats import NamedRows
from .quality_journal import Window, WindowJournal
from .quality_run import MODEL, REFERENCE, OneModel, Windows, comparisons, identity_of, perplexities

Interval = tuple[float, float]

MIN_WINDOWS = 5
"""Minimum number of windows for an interval."""


@dataclass(frozen=True)
class Quality(NamedRows):
    """Result of `quality`. Prints as a short table, and as HTML in a notebook.

    Intervals hold the value of more such text with a probability of about 95 %, as far as windows vary like independent
    samples. They are None for fewer than five windows.

    Attributes:
        model: Path or repository of the checkpoint.
        against: Path or repository of the reference; None if there is none, and so for all values of a comparison.
        tokens: Number of predicted tokens.
        windows: Number of windows.
        perplexity: Exponential of the mean negative log-likelihood per token.
        perplexity_interval: Interval of ``perplexity``.
        reference_perplexity: The reference's perplexity.
        perplexity_ratio: ``perplexity / reference_perplexity``.
        perplexity_ratio_interval: Interval of ``perplexity_ratio``, narrower than those of its parts: both models
            predict the same tokens.
        kl_divergence: Mean divergence of the model's distribution from the reference's, in nats per token.
        kl_divergence_interval: Interval of ``kl_divergence``.
        max_kl_divergence: Largest divergence of a token.
        top1_agreement: Share of tokens at which both find the same token likeliest.
        top1_agreement_interval: Interval of ``top1_agreement``.
        lossy: Settings of the model that change results.
    """

    model: str
    against: str | None
    tokens: int
    windows: int
    perplexity: float
    perplexity_interval: Interval | None
    reference_perplexity: float | None
    perplexity_ratio: float | None
    perplexity_ratio_interval: Interval | None
    kl_divergence: float | None
    kl_divergence_interval: Interval | None
    max_kl_divergence: float | None
    top1_agreement: float | None
    top1_agreement_interval: Interval | None
    lossy: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs in display order."""
        rows = [
            ("model", self.model),
            *([("against", self.against)] if self.against else []),
            ("tokens", f"{self.tokens:,} predicted in {self.windows:,} windows"),
            ("perplexity", _shown(self.perplexity, self.perplexity_interval)),
        ]
        if self.reference_perplexity is not None:
            rows += [
                ("reference's perplexity", _shown(self.reference_perplexity)),
                ("ratio", _shown(self.perplexity_ratio, self.perplexity_ratio_interval)),
                ("KL divergence", f"{_shown(self.kl_divergence, self.kl_divergence_interval)} nats per token"),
                ("largest", f"{_shown(self.max_kl_divergence)} nats"),
                ("same likeliest token", _shown(self.top1_agreement, self.top1_agreement_interval)),
            ]
        return [*rows, *(("lossy", note) for note in self.lossy)]

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def _shown(value: float | None, interval: Interval | None = None) -> str:
    text = "-" if value is None else f"{value:.6g}"
    return text if interval is None else f"{text} (95 %: {interval[0]:.6g} to {interval[1]:.6g})"


def quality(
    path_or_repo: str | Path,
    text: str,
    *,
    against: str | Path | None = None,
    num_experts_per_tok: int | None = None,
    activation_bits: int | None = None,
    window: int = 512,
    step: int | None = None,
    max_tokens: int | None = None,
    journal: str | Path | None = None,
    scratch: int | str = "2GB",
    memory_limit: int | str | None = None,
    gpu_memory_limit: int | str | None = None,
    io: str = "auto",
    verify: str | bool = "sample",
    trust_remote_code: bool = False,
    progress: bool | Report = True,
) -> Quality:
    """Measure a checkpoint's perplexity on a text, and how its predictions differ from a reference's.

    The text is cut into windows, each predicted from an empty context. One model is loaded at a time.

    Args:
        path_or_repo: Local directory, or a repository on the Hugging Face hub.
        text: The text to predict.
        against: Reference: another checkpoint with the same tokenizer, or the same one, to compare settings with its
            own. None measures perplexity alone.
        num_experts_per_tok: Override for the model's K. The reference keeps its own.
        activation_bits: 8 rounds the model's activations as in `load`, which only steps of one or two tokens do.
        window: Tokens per window.
        step: Maximum number of tokens per forward pass: 1 predicts as decoding does. None takes a window at once.
        max_tokens: Number of the text's tokens to use; None uses all.
        journal: File that keeps finished windows. If it is there, measuring resumes after them.
        scratch: Size of the temporary file for logits that await the other model, next to the journal if there is one.
            A window's always fit.
        memory_limit: As in `load`, for either model, with the logits of a block.
        gpu_memory_limit: As in `load`.
        io: As in `load`.
        verify: As in `load`.
        trust_remote_code: As in `load`.
        progress: As in `load`.

    Raises:
        CheckpointError: If the files can't be used; subclasses say why.
        MemoryLimitError: If the limit is too small for one of the models.
        RequestError: If an argument is not usable, the text is too short, the tokenizers differ, or the journal is that
            of another measurement.
        StoreError: If an expert can't be read.
    """
    check_text(text, "text")
    for name, value, least in (("window", window, 2), ("step", step, 1), ("max_tokens", max_tokens, 2)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise RequestError(f"[{name}] must be a number from {least}, got {value!r}. Choose another.")
    room = parse_size(scratch, "scratch")
    paths = {MODEL: path_or_repo} if against is None else {MODEL: path_or_repo, REFERENCE: against}
    own = {"num_experts_per_tok": num_experts_per_tok, "activation_bits": activation_bits}
    shared = {
        "memory_limit": memory_limit, "gpu_memory_limit": gpu_memory_limit, "max_context": window + 1, "io": io,
        "verify": verify, "trust_remote_code": trust_remote_code, "progress": False,
    }  # fmt: skip
    arguments = {
        part: {"path_or_repo": path, **shared, **(own if part == MODEL else {})} for part, path in paths.items()
    }
    identity = {
        "journal": "flash-moe quality 1", "text": hashlib.sha256(text.encode()).hexdigest(),
        "window": window, "step": step, "max_tokens": max_tokens, **own, REFERENCE: None,
        **{part: identity_of(path, local_directory(path, "quality")) for part, path in paths.items()},
    }  # fmt: skip
    place = None if journal is None else Path(journal).expanduser()
    windows = Windows(text, window, max_tokens)
    with showing(progress), WindowJournal(place, identity) as finished, OneModel(arguments, windows, window) as one:
        vocabulary_size = one.use(MODEL).vocabulary_size
        left = list(windows)[len(finished.windows) :]
        if against is None:
            scored = perplexities(one, left, step)
        else:
            together = max(1, room // (4 * vocabulary_size * window))
            scored = comparisons(one, left, step, together, None if place is None else place.parent)
        for scores in scored:
            finished.append(scores)
        return _summary(str(path_or_repo), None if against is None else str(against), finished.windows, one.lossy)


def _summary(model: str, against: str | None, windows: Sequence[Window], lossy: tuple[str, ...]) -> Quality:
    nll, nll_error = _mean(windows, [w.nll for w in windows])
    compared: dict[str, Any] = dict.fromkeys(
        ("reference_perplexity", "perplexity_ratio", "perplexity_ratio_interval", "kl_divergence",
         "kl_divergence_interval", "max_kl_divergence", "top1_agreement", "top1_agreement_interval")
    )  # fmt: skip
    if against is not None:
        more, more_error = _mean(windows, [w.nll - w.reference_nll for w in windows])
        kl, kl_error = _mean(windows, [w.kl for w in windows])
        agreed, agreed_error = _mean(windows, [w.agreed for w in windows])
        compared = {
            "reference_perplexity": math.exp(_mean(windows, [w.reference_nll for w in windows])[0]),
            "perplexity_ratio": math.exp(more),
            "perplexity_ratio_interval": _interval(more, more_error, exponent=True),
            "kl_divergence": kl,
            "kl_divergence_interval": _interval(kl, kl_error, least=0.0),
            "max_kl_divergence": max(w.kl_max for w in windows),
            "top1_agreement": agreed,
            "top1_agreement_interval": _interval(agreed, agreed_error, least=0.0, most=1.0),
        }
    return Quality(
        model=model,
        against=against,
        tokens=sum(w.tokens for w in windows),
        windows=len(windows),
        perplexity=math.exp(nll),
        perplexity_interval=_interval(nll, nll_error, exponent=True),
        lossy=lossy,
        **compared,
    )


def _mean(windows: Sequence[Window], sums: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean per token of windows' sums, and half its interval, by how windows vary."""
    tokens, count = sum(w.tokens for w in windows), len(windows)
    mean = sum(sums) / tokens
    if count < MIN_WINDOWS:
        return mean, None
    squares = sum((each - mean * w.tokens) ** 2 for each, w in zip(sums, windows, strict=True))
    return mean, _t_quantile(count - 1) * math.sqrt(squares * count / (count - 1)) / tokens


def _t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t. Reference: Abramowitz and Stegun 1964, 26.7.5, two terms."""
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _interval(
    mean: float, error: float | None, *, exponent: bool = False, least: float = -math.inf, most: float = math.inf
) -> Interval | None:
    if error is None:
        return None
    low, high = max(mean - error, least), min(mean + error, most)
    return (math.exp(low), math.exp(high)) if exponent else (low, high)

"""Scores windows of a text by two models of which one is loaded at a time."""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from ..progress import report
from ..runtime.loading import load
from .quality_journal import Window
from .scoring import divergence, log_probabilities, rows_of_logits, scratch_bytes

MODEL, REFERENCE = "model", "reference"


@dataclass(frozen=True)
class TextWindow:
    """A window of a text.

    Attributes:
        fed: Tokens to feed, from an empty context.
        targets: Tokens to predict: each follows one of the last of ``fed``.
        done: Number of the text's tokens before the window.
    """

    fed: tuple[int, ...]
    targets: tuple[int, ...]
    done: int


class Windows:
    """A text cut into windows by a model's tokenizer, once one has been loaded."""

    def __init__(self, text: str, window: int, max_tokens: int | None):
        self._text = text
        self._window = window
        self._max_tokens = max_tokens
        self._tokens: list[int] | None = None
        self._prefix: list[int] = []

    def encode(self, tokenizer: Any) -> None:
        """Tokenise the text, or check that this tokenizer gives the same tokens.

        Raises:
            RequestError: If it does not, or there are too few tokens.
        """
        tokens = list(tokenizer.encode(self._text, add_special_tokens=False, verbose=False))[: self._max_tokens]
        start = list(tokenizer.encode(""))
        prefix = start if start == [tokenizer.bos_token_id] else []
        if self._tokens is None:
            self._tokens, self._prefix = tokens, prefix
        if (tokens, prefix) != (self._tokens, self._prefix):
            raise RequestError(
                "[against] must be a checkpoint with the model's tokenizer, got other tokens for the text. Choose one "
                "of the same family."
            )
        if len(tokens) + len(prefix) < 2:
            raise RequestError(f"[text] must have at least two tokens, got {len(tokens)}. Pass a longer text.")

    def __iter__(self) -> Iterator[TextWindow]:
        tokens = self._tokens or []
        for start in range(0, len(tokens), self._window):
            part = [*self._prefix, *tokens[start : start + self._window]]
            if len(part) > 1:
                yield TextWindow(tuple(part[:-1]), tuple(part[1:]), start)

    def report(self, who: str, window: TextWindow) -> None:
        """Report that a window is about to be predicted."""
        report(f"predicting with the {who}", window.done, len(self._tokens or []), "tokens")


class OneModel:
    """Two checkpoints, of which at most one is loaded. A context manager.

    Attributes:
        lossy: Settings of the measured model that change results, once it has been loaded.
        windows: The text, which each model's tokenizer sees.
    """

    def __init__(self, arguments: Mapping[str, Mapping[str, Any]], windows: Windows, window: int):
        """Take the arguments of `load` by the model's part, MODEL or REFERENCE."""
        self.lossy: tuple[str, ...] = ()
        self.windows = windows
        self._arguments = arguments
        self._window = window
        self._name = ""
        self._model: Any = None
        self._before = 0  # MLX's memory without a model
        self._vocabulary_size: int | None = None

    def use(self, name: str) -> Any:
        """Return a model; the other one is closed and its memory returned.

        Raises:
            MemoryLimitError: If the limit holds the model, but not with a block of logits.
            RequestError: If the models' tokens differ.
        """
        if self._name != name:
            self.close()
            self._before = mx.get_active_memory()
            model, tokenizer = load(**self._arguments[name])
            self._name, self._model = name, model
            self._check(model, tokenizer)
            if name == MODEL:
                self.lossy = tuple(model.streaming.stats().lossy)
        return self._model

    def close(self) -> None:
        """Close the model that is loaded, if any."""
        if self._model is not None:
            self._model.streaming.close()
            self._model, self._name = None, ""
            mx.clear_cache()
            if mx.get_active_memory() > self._before:  # parts that refer to each other, after single tokens on a CPU
                gc.collect()
                mx.clear_cache()

    def __enter__(self) -> "OneModel":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check(self, model: Any, tokenizer: Any) -> None:
        engine, size = model.streaming, model.vocabulary_size
        if engine.ranks > 1:
            raise RequestError(f"[quality] must run in one process, got {engine.ranks} ranks. Start it alone.")
        if self._vocabulary_size not in (None, size):
            raise RequestError(
                f"[against] must have the model's vocabulary, got {size} and {self._vocabulary_size} tokens. Choose a "
                "checkpoint of the same family."
            )
        self._vocabulary_size = size
        self.windows.encode(tokenizer)
        stats = engine.stats()
        limit = stats.gpu_memory_limit_bytes or stats.memory_limit_bytes
        engine.resize_slots(limit - scratch_bytes(size, self._window))


def perplexities(one: OneModel, windows: Sequence[TextWindow], step: int | None) -> Iterator[Window]:
    """Yield each window's scores by the model alone."""
    model = one.use(MODEL)
    for window in windows:
        one.windows.report(MODEL, window)
        nll = 0.0
        for row, target in zip(_rows(model, window, step), window.targets, strict=True):
            nll -= float(log_probabilities(row)[target])
        yield Window(len(window.targets), nll)


def comparisons(
    one: OneModel, windows: Sequence[TextWindow], step: int | None, together: int, folder: Path | None
) -> Iterator[Window]:
    """Yield each window's scores by the model and the reference.

    Args:
        one: The models.
        windows: Windows to score.
        step: Maximum number of tokens per forward pass.
        together: Number of windows whose logits fit into the temporary file.
        folder: Place of the temporary file; None takes the system's.
    """
    order = [MODEL, REFERENCE]
    for start in range(0, len(windows), together):
        part = windows[start : start + together]
        with TemporaryFile(dir=folder) as file:
            first = one.use(order[0])
            for window in part:
                one.windows.report(order[0], window)
                for row in _rows(first, window, step):
                    file.write(row.tobytes())
            del first
            file.seek(0)
            second = one.use(order[1])
            for window in part:
                one.windows.report(order[1], window)
                yield _compared(window, _rows(second, window, step), file, order[0] == REFERENCE)
            del second
        order.reverse()  # the one that is loaded goes first


def _rows(model: Any, window: TextWindow, step: int | None) -> Iterator[np.ndarray]:
    return rows_of_logits(model, window.fed, keep=len(window.targets), step=step)


def _compared(window: TextWindow, rows: Iterator[np.ndarray], file: BinaryIO, stored_is_reference: bool) -> Window:
    """Score a window by logits that are computed, and the other model's, read from a file."""
    nll = reference_nll = total = largest = 0.0
    agreed = 0
    for row, target in zip(rows, window.targets, strict=True):
        pair = [row, np.frombuffer(file.read(row.nbytes), np.float32)]
        model, reference = pair if stored_is_reference else pair[::-1]
        agreed += int(model.argmax() == reference.argmax())
        own, other = log_probabilities(model), log_probabilities(reference)
        kl = divergence(other, own)
        nll, reference_nll = nll - float(own[target]), reference_nll - float(other[target])
        total, largest = total + kl, max(largest, kl)
    return Window(len(window.targets), nll, reference_nll, total, largest, agreed)


def identity_of(path_or_repo: str | Path, directory: Path | None) -> dict[str, Any]:
    """Return what tells a checkpoint from another: its name, and the sizes and times of its files if it is local."""
    found: dict[str, Any] = {"name": os.fspath(path_or_repo)}
    if directory is not None:
        files = sorted([*directory.rglob("*.safetensors"), *directory.glob("*.json")])
        found["files"] = {str(p.relative_to(directory)): [p.stat().st_size, p.stat().st_mtime_ns] for p in files}
    return found

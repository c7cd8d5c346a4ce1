"""A server whose model says what a test tells it: passes through the embedded model are real, its choices are not."""

import contextlib
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import mlx.core as mx
import pytest

import flash_moe_mlx
from flash_moe_mlx.server import worker

from .chat_models import encoded
from .serving import served


class Script:
    """The model's answers, request by request."""

    def __init__(self) -> None:
        self.answers: list[list[int]] = []
        self.prompts: list[list[int]] = []
        self.seconds = 0.0
        self.gates: list[threading.Event] = []  # each request's first token waits for its own

    def play(self, tokenizer: Any, *texts: str, end: bool = True) -> None:
        """Set the answers to come; one without an end token continues as long as it is allowed to."""
        last = [tokenizer.eos_token_id] if end else [encoded(tokenizer, "x")[0]] * 64
        self.answers = [[*encoded(tokenizer, text), *last] for text in texts]


@contextlib.contextmanager
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Script]]:
    """Yields a function that serves a tokenizer, and the script of its model."""
    script = Script()

    def sampler(*_: Any) -> Any:
        answer = iter(script.answers.pop(0))
        gate = script.gates.pop(0) if script.gates else None

        def sample(logprobs: mx.array) -> mx.array:
            if gate is not None:
                gate.wait(60)
            time.sleep(script.seconds)
            return mx.array([next(answer)])

        return sample

    monkeypatch.setattr(worker, "sampler_for", sampler)
    model = flash_moe_mlx.load_model(files("flash_moe_mlx") / "demo", memory_limit="300MB", max_context=4096)

    def serve(tokenizer: Any, **config: Any) -> Any:
        return served(model, tokenizer, **config)

    with model.streaming:
        yield serve, script

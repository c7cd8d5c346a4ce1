"""Cancellation of forward passes: any of the nested events ends them."""

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import mlx.core as mx
import pytest

from ..support.models import chat_config, make_converted, streamed


def test_leaving_an_inner_event_keeps_the_outer_one(tmp_path: Path) -> None:
    tokens = mx.array([[1, 2, 3, 4, 5]])
    outer, inner = threading.Event(), threading.Event()
    with streamed(make_converted(tmp_path / "checkpoint", config=chat_config(), bits=4)) as model:
        with model.streaming.cancellable(outer):
            with model.streaming.cancellable(inner):
                mx.eval(model(tokens))
            inner.set()
            mx.eval(model(tokens))
            outer.set()
            with pytest.raises(CancelledError):
                model(tokens)
        mx.eval(model(tokens))

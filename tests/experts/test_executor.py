"""The seam for experts: executors that share a layer's experts give the bits of one that has them all."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.experts.trace import RoutingTrace
from flash_moe_mlx.models.moe_block import StreamingMoE

from ..support.models import chat_config, logits_of, make_converted, smallest_limit, streamed
from ..support.split_experts import SplitExperts

EXPERTS, K = 16, 3
OWNERS = {
    "halves": np.arange(EXPERTS) // (EXPERTS // 2),
    "odd-and-even": np.arange(EXPERTS) % 2,
    "one-has-three": (np.arange(EXPERTS) > 2).astype(int),
    "one-has-none": np.zeros(EXPERTS, int),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = chat_config(num_experts=EXPERTS, num_experts_per_tok=K)
    return make_converted(tmp_path_factory.mktemp("checkpoint"), config=config, bits=4)


def share_experts(model: Any, engines: list[Any], owner: np.ndarray) -> None:
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mlp, StreamingMoE):
            layer.mlp.routed = SplitExperts([engine.executor(index) for engine in engines], owner)


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[np.ndarray]:
    with streamed(directory) as model:
        return logits_of(model)


@pytest.mark.parametrize("slots", ["fewest", "all"])
@pytest.mark.parametrize("owners", OWNERS)
def test_two_executors_with_their_own_stores_give_the_bits_of_one(
    directory: Path, expected: list[np.ndarray], owners: str, slots: str
):
    limit = smallest_limit(directory) if slots == "fewest" else "1GB"
    with streamed(directory, limit) as model, streamed(directory, limit) as other:
        share_experts(model, [model.streaming, other.streaming], OWNERS[owners])
        found = logits_of(model)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        reads = [engine.streaming.counters.bytes_read for engine in (model, other)]
        assert reads[0] > 0 and (reads[1] > 0) == (owners != "one-has-none")


def test_an_executor_computes_nothing_for_ids_elsewhere(directory: Path):
    with streamed(directory) as model, model.streaming.forward_pass(1, 1, 1):
        hidden = mx.random.normal((2, model.config.hidden_size))
        executor = model.layers[0].mlp.routed
        whole = np.array(executor.begin(np.array([[3, 5, 7], [5, 1, 2]])).run(hidden))
        part = np.array(executor.begin(np.array([[3, -1, 7], [-1, -1, 2]])).run(hidden))
    assert not part[[0, 1, 1], [1, 0, 1]].any()
    np.testing.assert_array_equal(part[[0, 0, 1], [0, 2, 2]], whole[[0, 0, 1], [0, 2, 2]])


def test_the_trace_is_noted_at_the_seam(directory: Path, tmp_path: Path):
    with streamed(directory) as model:
        with model.streaming.trace(tmp_path / "trace.npz"), model.streaming.forward_pass(1, 2, 2):
            executor = model.layers[1].mlp.routed
            ids = mx.array([[4, 9, 0], [2, 9, 15]], mx.uint32)
            mx.eval(executor.begin(ids, mx.ones((2, 3))).run(mx.ones((2, model.config.hidden_size))))
        trace = RoutingTrace.read(tmp_path / "trace.npz")
    np.testing.assert_array_equal(trace.experts[:, list(trace.layers).index(1)], np.array(ids))

"""Guesses of the next layer's experts: what is compared is what the engine computes; the simulated disk's times."""

from pathlib import Path

import numpy as np
import pytest
from benchmarks.next_layer import made_up, misses_of, observe, recall, seconds
from benchmarks.record_routing import DEMO, conversations, record

from flash_moe_mlx import load
from flash_moe_mlx.experts.trace import DECODE, RoutingTrace
from flash_moe_mlx.planning.simulation import replay


def test_observed_experts_are_those_of_the_engines_trace(tmp_path: Path):
    model, tokenizer = load(DEMO, memory_limit="60MB", max_context=512)
    with model.streaming:
        (pair,) = conversations(tokenizer, 1)
        record(model, [pair], tmp_path / "routing.npz")
        found = observe(model, [pair[0] + pair[1]])
    trace = RoutingTrace.read(tmp_path / "routing.npz")
    assert (trace.phase == DECODE).sum() == len(pair[1]) and found.num_experts == 16
    same = np.sort(trace.experts) == np.sort(found.experts)
    assert same.mean() > 0.999, "but for rounding: a prompt's products and decoding's"
    late = recall(found.guesses["late"][..., :4], found.experts[:, 1:])
    assert 0.5 < late <= recall(found.guesses["late"], found.experts[:, 1:]) <= 1


def test_recall():
    experts = np.array([[[1, 2]], [[3, 4]]])
    guesses = np.array([[[2, 9, 1, 8]], [[7, 8, 9, 3]]])
    assert recall(guesses[..., :2], experts) == 0.25 and recall(guesses, experts) == 0.75
    assert recall(guesses[..., :2], experts, np.array([[[False, True]], [[False, False]]])) == 1


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_made_up_guesses_are_right_as_often_as_asked(right: float):
    rng = np.random.default_rng(0)
    experts = np.array([[rng.permutation(32)[:4] for _ in range(3)] for _ in range(300)])
    guesses = made_up(experts, 32, right)
    assert recall(guesses, experts[:, 1:]) == recall(guesses[..., :4], experts[:, 1:]) == pytest.approx(right, abs=0.05)
    assert all(len(set(row)) == 8 for row in guesses.reshape(-1, 8).tolist())


def test_misses_are_those_of_the_engines_cache():
    rng = np.random.default_rng(1)
    experts = np.array([[rng.permutation(12)[:3] for _ in range(2)] for _ in range(200)])
    trace = RoutingTrace(experts, np.full(200, DECODE), (0, 1), 12, np.ones(200, int))
    assert misses_of(experts, 5).sum() == replay(trace, 5).misses.sum()


@pytest.mark.parametrize(
    ("read", "guesses", "way", "known_after", "expected"),
    [
        (0.5, None, "greedy", 0.0, (3.0, 0, 0)),
        (0.5, [[[], [2]]], "in time", 0.0, (2.5, 1, 1)),
        (0.5, [[[], [9]]], "greedy", 0.0, (3.0, 1, 0)),  # wrong, but over before the next router
        (0.5, [[[], [9, 8, 2]]], "greedy", 0.0, (3.0, 2, 0)),  # the third would begin too late
        (2.0, None, "greedy", 0.0, (6.0, 0, 0)),
        (2.0, [[[], [2]]], "greedy", 0.0, (5.0, 1, 1)),  # half of it is read when it is asked for
        (2.0, [[[], [9]]], "greedy", 0.0, (7.0, 1, 0)),  # the true miss waits for the wrong one
        (2.0, [[[], [9]]], "in time", 0.0, (6.0, 0, 0)),
        (2.0, [[[], [9]]], "weighed", 0.0, (6.0, 0, 0)),
        (0.75, [[[], [2]]], "in time", 0.5, (3.5, 0, 0)),  # the guess comes too late
        (0.75, [[[], [2]]], "greedy", 0.5, (3.0, 1, 1)),
    ],
)
def test_times(read: float, guesses: list | None, way: str, known_after: float, expected: tuple[float, int, int]):
    assert seconds([[[1], [2]]], guesses, read, way, known_after) == pytest.approx(expected)

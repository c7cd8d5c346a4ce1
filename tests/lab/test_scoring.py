"""Scores of continuations are those of whole logits, whatever was scored before."""

from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.lab.scoring import ContinuationScorer, rows_of_logits
from flash_moe_mlx.runtime.loading import load_model

from ..support.numerics import floats

DEMO = Path(str(files("flash_moe_mlx") / "demo"))
TOKENS = np.random.default_rng(5).integers(3, 2000, 70).tolist()


@pytest.fixture(scope="module")
def demo():
    model = load_model(DEMO, memory_limit="100MB", max_context=128)
    with model.streaming:
        yield model


def expected(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The score from the logits of one pass over both."""
    logits = floats(model(mx.array([context + continuation]), logits_to_keep=len(context + continuation)))
    rows = logits[0, len(context) - 1 : -1].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    picked = [row[token] for row, token in zip(rows, continuation, strict=True)]
    return sum(picked), [int(row.argmax()) for row in rows] == continuation


@pytest.mark.parametrize("context", [1, 2, 40])
@pytest.mark.parametrize("continuation", [1, 12])
def test_scores_are_those_of_whole_logits(demo, context: int, continuation: int):
    own, following = TOKENS[:context], TOKENS[40 : 40 + continuation]
    score, greedy = ContinuationScorer(demo).score(own, following)
    total, likeliest = expected(demo, own, following)
    assert score == pytest.approx(total, abs=1e-3) and greedy == likeliest


def test_the_likeliest_tokens_are_greedy(demo):
    context, best = TOKENS[:20], []
    for _ in range(3):
        best.append(int(floats(demo(mx.array([context + best]), logits_to_keep=1)).argmax()))
    scorer = ContinuationScorer(demo)
    assert scorer.score(context, best)[1]
    assert not scorer.score(context, [*best[:2], (best[2] + 1) % 2000])[1]


def test_scores_do_not_depend_on_what_was_scored_before(demo):
    context, answers = TOKENS[:30], [TOKENS[30:35], TOKENS[40:41], TOKENS[50:62]]
    alone = [ContinuationScorer(demo).score(context, answer) for answer in answers]
    scorer = ContinuationScorer(demo)
    assert [scorer.score(context, answer) for answer in answers] == alone
    scorer.score(TOKENS[:9], TOKENS[9:12])
    assert [scorer.score(context, answer) for answer in answers[::-1]] == alone[::-1]


def test_a_context_is_read_once(demo, monkeypatch: pytest.MonkeyPatch):
    lengths: list[int] = []
    own = type(demo)._run

    def counted(self, inputs: mx.array, *rest):
        lengths.append(inputs.shape[1])
        return own(self, inputs, *rest)

    monkeypatch.setattr(type(demo), "_run", counted)
    scorer = ContinuationScorer(demo, step=16)
    for answer in (TOKENS[40:44], TOKENS[50:52]):
        scorer.score(TOKENS[:30], answer)
    assert lengths == [16, 13, 4, 2]


def test_rows_by_steps_and_from_the_middle(demo):
    every = np.stack(list(rows_of_logits(demo, TOKENS)))
    for keep, step in ((5, None), (33, 20), (70, 16)):
        rows = np.stack(list(rows_of_logits(demo, TOKENS, keep=keep, step=step)))
        assert rows.shape == (keep, 2048) and np.allclose(rows, every[-keep:], atol=2e-3)


def test_more_than_the_context_is_refused(demo):
    with pytest.raises(RequestError, match="max_context"):
        ContinuationScorer(demo).score(TOKENS * 2, [5])

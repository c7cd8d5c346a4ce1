"""Sampling parameters as mlx_lm's functions get them."""

import mlx.core as mx
import pytest

from flash_moe_mlx.server.sampling import processors_for, sampler_for
from flash_moe_mlx.server.schema import Sampling


def processed(sampling: Sampling, tokens: list[int], prompt_tokens: int) -> list[float]:
    logits = mx.array([[2.0, 2.0, 2.0, -2.0]])
    for processor in processors_for(sampling, prompt_tokens, 100):
        logits = processor(mx.array(tokens, mx.uint32), logits)
    return logits[0].tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [2, 2, 2, -2]),
        (Sampling(presence_penalty=1.0), [2, 1, 2, -3]),  # the prompt's tokens don't count
        (Sampling(frequency_penalty=0.5), [2, 1, 2, -2.5]),
        (Sampling(repetition_penalty=2.0), [1, 1, 2, -4]),  # here they do
        (Sampling(logit_bias={2: -100.0}), [2, 2, -98, -2]),
    ],
)
def test_penalties(sampling: Sampling, expected: list[float]):
    assert processed(sampling, [0, 0, 1, 1, 3], 2) == expected


def test_penalties_before_the_first_token():
    assert processed(Sampling(presence_penalty=1.0, frequency_penalty=1.0), [0, 1], 2) == [2, 2, 2, -2]


def test_top_k_of_the_whole_vocabulary_and_beyond():
    logprobs = mx.log(mx.array([[0.25, 0.25, 0.25, 0.25]]))
    for top_k in (4, 1000):
        assert 0 <= sampler_for(Sampling(temperature=1.0, top_k=top_k), 4)(logprobs).item() < 4


def test_seed():
    logprobs = mx.zeros((1, 1000))

    def draw(seed: int | None) -> list[int]:
        sample = sampler_for(Sampling(temperature=1.0, seed=seed), 1000)
        return [sample(logprobs).item() for _ in range(3)]

    assert draw(7) == draw(7) != draw(8)
    assert len(set(draw(7))) > 1, "seeded once, not before each token"
    assert draw(-1) == draw(-1)
    draw(7)
    assert draw(None) != draw(None)

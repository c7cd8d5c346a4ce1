"""Sampling parameters as mlx_lm's functions get them."""

import json
from importlib.resources import files
from types import SimpleNamespace

import mlx.core as mx
import pytest

import flash_moe_mlx
from flash_moe_mlx import FlashMoEError
from flash_moe_mlx.chat.text import token_table
from flash_moe_mlx.server.openai_format import ChatFormat, CompletionFormat, event
from flash_moe_mlx.server.parts import TextPart, TokenLogprob
from flash_moe_mlx.server.sampling import processors_for, sampler_for, token_logprob
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


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_log_probabilities_of_every_activation_dtype(dtype: mx.Dtype):
    """On a GPU activations are the checkpoint's bfloat16, which numpy does not read."""
    demo_path = files("flash_moe_mlx") / "demo"
    model, tokenizer = flash_moe_mlx.load(demo_path, memory_limit="100MB", max_context=128)
    model.set_dtype(dtype)
    seen: list[mx.Dtype] = []

    def sampler(logprobs: mx.array) -> mx.array:
        seen.append(logprobs.dtype)
        return mx.argmax(logprobs, axis=-1)

    with model.streaming:
        for response in flash_moe_mlx.stream_generate(model, tokenizer, "Hi", 2, sampler=sampler):
            assert response.logprobs.dtype == mx.float32
            assert mx.logsumexp(response.logprobs).item() == pytest.approx(0, abs=1e-5)
            found = token_logprob(response, "a", token_table(tokenizer), 3)
            assert found.logprob == found.top[0][1] == pytest.approx(response.logprobs.max().item())
    assert set(seen) == {mx.float32}


def test_log_probabilities_that_are_none_are_no_json():
    response = SimpleNamespace(token=1, logprobs=mx.array([0.0, float("nan")]))
    with pytest.raises(FlashMoEError, match="NaN"):
        token_logprob(response, "a", None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1e30], ids=str)
def test_events_hold_numbers(value: float):
    finished = [TextPart("content", "a", (TokenLogprob("a", value, (("b", value, b"b"),)),))]
    for answer in (ChatFormat("demo", True), CompletionFormat("demo", True)):
        text = event(answer.chunk(finished[0], 0)).decode()
        assert json.loads(text[6:], parse_constant=lambda name: pytest.fail(name))["choices"][0]["logprobs"]
    with pytest.raises(ValueError, match="JSON"):
        event({"a": float("nan")})


def test_an_event_is_text_whatever_the_model_says():
    assert json.loads(event({"a": "\ud83d"})[6:]) == {"a": "?"}

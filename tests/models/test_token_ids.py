"""Token ids that the embeddings don't have: refused on every path, before anything is read."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from flash_moe_mlx import RequestError, generate, load, stream_generate

from ..support.models import VOCABULARY, make_small


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, tokenizer = load(make_small(tmp_path_factory.mktemp("checkpoint")), memory_limit="100MB")
    with model.streaming:
        yield model, tokenizer


IDS = [VOCABULARY, 10**6, 2**31 - 1, -1]


@pytest.mark.parametrize("token", IDS)
def test_ids_outside_the_vocabulary(token: int, loaded: Any) -> None:
    model, tokenizer = loaded
    calls: list[Callable[[], Any]] = [
        lambda: model(mx.array([[token]])),
        lambda: model(mx.array([[1, token]])),
        lambda: model(mx.array([[1] * 20 + [token]])),
        lambda: model(mx.array([[1], [token]]), cache=None),
        lambda: generate(model, tokenizer, [1, token, 2], max_tokens=2),
        lambda: list(stream_generate(model, tokenizer, [1, 2], max_tokens=3, sampler=lambda _: mx.array([token]))),
    ]
    if token >= 0:  # mlx_lm makes them unsigned
        calls += [
            lambda: mlx_lm.generate(model, tokenizer, [1, token, 2], max_tokens=2),
            lambda: mlx_lm.batch_generate(model, tokenizer, [[1, 2, token]], max_tokens=2),
        ]
    expected = generate(model, tokenizer, [1, 2], max_tokens=4)
    for call in calls:
        with pytest.raises(RequestError, match=f"from 0 to {VOCABULARY - 1}"):
            call()
    assert generate(model, tokenizer, [1, 2], max_tokens=4) == expected


@pytest.mark.parametrize(
    "tokens",
    [
        mx.array([[1.0]]),
        mx.array([[True]]),
        mx.array([1]),
        mx.array(1),
        mx.zeros((1, 0), mx.uint32),
        [[1]],
    ],
    ids=["float", "bool", "no-batch", "scalar", "empty", "list"],
)
def test_what_are_no_ids(tokens: Any, loaded: Any) -> None:
    with pytest.raises(RequestError, match="inputs"):
        loaded[0](tokens)


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64])
def test_every_integer_dtype_works(dtype: mx.Dtype, loaded: Any) -> None:
    model, _ = loaded
    assert mx.array_equal(model(mx.array([[7]], dtype)), model(mx.array([[7]])))


@pytest.mark.parametrize("sampled", [mx.array([3.0]), mx.array([1, 2]), 7, mx.array([[1]])], ids=str)
def test_what_samplers_may_not_return(sampled: Any, loaded: Any) -> None:
    with pytest.raises(RequestError, match="sampler"):
        list(stream_generate(*loaded, [1, 2], max_tokens=2, sampler=lambda _: sampled))

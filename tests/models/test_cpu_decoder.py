"""Single tokens on the CPU, as tapes, against the same model run through MLX."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.experts.trace import NOT_RECORDED, RoutingTrace
from flash_moe_mlx.models import decoder as hybrid
from flash_moe_mlx.models.caches import ArraysCache
from flash_moe_mlx.ops.backend import use_cpu_kernels

from ..support.models import VOCABULARY, chat_config, make_converted, smallest_limit, streamed
from ..support.numerics import assert_close

pytestmark = pytest.mark.skipif(not use_cpu_kernels(), reason="the CPU kernels are not in use")

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4-bit": ({}, {"bits": 4}),
    "3-bit-g32": ({}, {"bits": 3, "group_size": 32}),
    "8-bit-g128": ({}, {"bits": 8, "group_size": 128}),
    "unquantised": ({}, {}),
    "f16": ({}, {"dtype": mx.float16}),
    "tied": ({"tie_word_embeddings": True}, {"bits": 4}),
    "one-expert": ({"num_experts_per_tok": 1}, {"bits": 4}),
    "probabilities": ({"norm_topk_prob": False}, {"bits": 5, "group_size": 32}),
}
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, (1, 330)).astype(np.uint32)
PROMPT = 250
"""So that attention crosses from one split of keys, and one step of the cache, to the next."""


def decode(model: Any, cache: list[Any], start: int, end: int) -> np.ndarray:
    return np.stack([np.array(model(mx.array(TOKENS[:, i : i + 1]), cache=cache))[0, 0] for i in range(start, end)])


def prefilled(model: Any, length: int = PROMPT) -> list[Any]:
    cache = model.make_cache()
    mx.eval(model(mx.array(TOKENS[:, :length]), cache=cache, logits_to_keep=1))
    return cache


@pytest.fixture
def through_mlx(monkeypatch: pytest.MonkeyPatch) -> Any:
    def without() -> pytest.MonkeyPatch:
        monkeypatch.setattr(hybrid.HybridModel, "_decoder", lambda self: None)
        return monkeypatch

    return without


@pytest.mark.parametrize("case", CASES)
def test_matches_mlx(case: str, tmp_path: Path, through_mlx: Any) -> None:
    config, how = CASES[case]
    with streamed(make_converted(tmp_path, config=chat_config(**config), **how)) as model:
        tapes = decode(model, prefilled(model), PROMPT, PROMPT + 20)
        assert model._cpu_decoder is not None
        through_mlx()
        assert_close(case, decode(model, prefilled(model), PROMPT, PROMPT + 20), tapes, 1e-5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("checkpoint"), config=chat_config(), bits=4)


def test_bits_do_not_depend_on_what_is_in_memory(directory: Path) -> None:
    with streamed(directory) as model:
        expected = decode(model, prefilled(model), PROMPT, PROMPT + 12)
    with streamed(directory, smallest_limit(directory)) as model:
        assert np.array_equal(decode(model, prefilled(model), PROMPT, PROMPT + 12), expected)
        assert 0 < model.streaming.stats().hit_rate < 1


def test_two_tokens_at_once_are_two_steps(directory: Path, tmp_path: Path) -> None:
    with streamed(directory) as model:
        expected = decode(model, prefilled(model), PROMPT, PROMPT + 4)
        first, second = (mx.array(TOKENS[:, i : i + 2]) for i in (PROMPT, PROMPT + 2))
        with model.streaming.trace(tmp_path / "trace.npz"):
            cache = prefilled(model)
            assert np.array_equal(np.array(model(first, cache=cache))[0], expected[:2])
            assert np.array_equal(np.array(model(second, cache=cache, logits_to_keep=1))[0], expected[3:])
        cache = prefilled(model)
        assert model(first, cache=cache, logits_to_keep=0).shape == (1, 0, VOCABULARY)
        assert np.array_equal(np.array(model(second, cache=cache, logits_to_keep=2))[0], expected[2:])
        trace = RoutingTrace.read(tmp_path / "trace.npz")
        assert trace.passes.tolist() == [PROMPT, 2, 2]
        assert (trace.experts != NOT_RECORDED).all()


def test_a_prompt_without_logits_leaves_out_what_only_they_need(directory: Path, tmp_path: Path) -> None:
    prompt = mx.array(TOKENS[:, :PROMPT])
    with streamed(directory) as model:
        whole, caches = model.make_cache(), model.make_cache()
        mx.eval(model(prompt, cache=whole, logits_to_keep=1))
        last = model.config.num_hidden_layers - 1
        asked = model.streaming.stats().bytes_read
        model.streaming.clear()
        model.streaming.reset_stats()
        assert model(prompt, cache=caches, logits_to_keep=0).shape == (1, 0, VOCABULARY)
        assert len(model.streaming.debug_state().cache.present(last)) == 0
        assert 0 < model.streaming.stats().bytes_read < asked
        assert np.array_equal(decode(model, caches, PROMPT, PROMPT + 4), decode(model, whole, PROMPT, PROMPT + 4))
        with model.streaming.trace(tmp_path / "trace.npz"):
            model(prompt, cache=model.make_cache(), logits_to_keep=0)
        assert (RoutingTrace.read(tmp_path / "trace.npz").experts != NOT_RECORDED).all()


def test_copies_of_a_cache_go_their_own_ways(directory: Path) -> None:
    with streamed(directory) as model:
        expected = decode(model, prefilled(model), PROMPT, PROMPT + 12)
        cache = prefilled(model)
        decode(model, cache, PROMPT, PROMPT + 6)
        states = [copy.copy(c.state) for c in cache]
        other = copy.deepcopy(cache)
        first = decode(model, cache, PROMPT + 6, PROMPT + 12)
        assert np.array_equal(first, expected[6:])
        assert np.array_equal(decode(model, other, PROMPT + 6, PROMPT + 12), expected[6:])
        for c, state in zip(cache, states, strict=True):
            c.state = state
        assert np.array_equal(decode(model, cache, PROMPT + 6, PROMPT + 12), expected[6:])


def test_a_prompt_goes_on_after_tokens(directory: Path) -> None:
    with streamed(directory) as model:
        cache = prefilled(model)
        decode(model, cache, PROMPT, PROMPT + 6)
        mixed = np.array(model(mx.array(TOKENS[:, PROMPT + 6 : 300]), cache=cache))[0]
        whole = np.array(model(mx.array(TOKENS[:, :300])))[0, PROMPT + 6 :]
        assert_close("after tokens", whole, mixed, 1e-5)
        assert_close(
            "tokens again", np.array(model(mx.array(TOKENS[:, :301])))[0, 300:], decode(model, cache, 300, 301), 1e-5
        )


def test_other_weights_are_seen(directory: Path) -> None:
    with streamed(directory) as model:
        before = decode(model, prefilled(model), PROMPT, PROMPT + 2)
        norm = model.text_model.norm
        norm.weight = 2 * norm.weight
        cache = prefilled(model)
        after = decode(model, cache, PROMPT, PROMPT + 2)
        assert_close("doubled", 2 * before, after, 1e-6)
        other = copy.deepcopy(model)
        assert np.array_equal(decode(other, prefilled(other), PROMPT, PROMPT + 2), after)


def test_a_layer_that_tapes_do_not_know_is_run_through_mlx(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with streamed(directory) as model:
        expected = decode(model, prefilled(model), PROMPT, PROMPT + 2)
        layer = model.text_model.layers[0].mlp

        class Wrapped(hybrid.nn.Module):
            def __init__(self, inner: Any):
                super().__init__()
                self.inner = inner

            def __call__(self, x: mx.array) -> mx.array:
                return self.inner(x)

        layer.gate = Wrapped(layer.gate)
        assert_close("wrapped", expected, decode(model, prefilled(model), PROMPT, PROMPT + 2), 1e-5)
        assert model._has_other_layers
        assert "Wrapped" in model.streaming.stats().slow_decode
        assert "slow decode" in str(model.streaming.stats())
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def arrays_of(cache: Any) -> list[mx.array]:
    return cache.cache if isinstance(cache, ArraysCache) else [cache.keys, cache.values]


def change(cache: Any, how: Callable[[mx.array], mx.array]) -> None:
    changed = [how(array) for array in arrays_of(cache)]
    if isinstance(cache, ArraysCache):
        cache.cache = changed
    else:
        cache.keys, cache.values = changed


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_conversation_goes_on_after_a_cast(dtype: mx.Dtype, directory: Path) -> None:
    """Caches of another dtype have less room than float32 takes."""
    with streamed(directory) as model:
        expected = decode(model, prefilled(model), PROMPT, PROMPT + 20)
        cache = prefilled(model)
        for layer_cache in cache:
            change(layer_cache, lambda array: array.astype(dtype))
        rounded = decode(model, cache, PROMPT, PROMPT + 20)
        assert model._cpu_decoder is not None
        assert_close("cast", expected, rounded, 0.2)
        assert all(array.dtype == mx.float32 for layer_cache in cache for array in arrays_of(layer_cache))


def test_strided_weights_and_other_dtypes(directory: Path, through_mlx: Any) -> None:
    """An owner may assign transposed or sliced weights, or bfloat16."""
    with streamed(directory) as model:
        for layer in model.layers:
            norm = layer.input_layernorm
            norm.weight = norm.weight.astype(mx.bfloat16)
            projection = layer.mlp.shared_expert.down_proj
            projection.scales = mx.contiguous(projection.scales.T).T
            projection.weight = mx.concatenate([projection.weight, projection.weight], axis=1)[:, ::2]
            gate = layer.mlp.gate
            gate.scales = mx.contiguous(gate.scales.T).T
        tapes = decode(model, prefilled(model), PROMPT, PROMPT + 6)
        assert model._cpu_decoder is not None and not model._has_other_layers
        through_mlx()
        assert_close("strided", decode(model, prefilled(model), PROMPT, PROMPT + 6), tapes, 1e-5)


def test_a_cache_of_another_model_is_refused(directory: Path) -> None:
    with streamed(directory) as model:
        for place in (0, next(i for i, layer in enumerate(model.layers) if layer.mixer_name == "self_attn")):
            cache = prefilled(model)
            change(cache[place], lambda array: array[:, :1, ..., :8])
            with pytest.raises(RequestError, match="cache"):
                decode(model, cache, PROMPT, PROMPT + 1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rounded_activations_are_close_and_named(group_size: int, tmp_path: Path) -> None:
    directory = make_converted(tmp_path, config=chat_config(), bits=4, group_size=group_size)
    with streamed(directory) as model:
        exact = decode(model, prefilled(model), PROMPT, PROMPT + 20)
        assert model.streaming.stats().lossy == ()
    with streamed(directory, activation_bits=8) as model:
        rounded = decode(model, prefilled(model), PROMPT, PROMPT + 20)
        assert model.streaming.stats().lossy == ("8-bit activations in decode",)
    with streamed(directory, smallest_limit(directory), activation_bits=8) as model:
        assert np.array_equal(decode(model, prefilled(model), PROMPT, PROMPT + 20), rounded)
    errors = np.sqrt(((rounded - exact) ** 2).mean(axis=1) / (exact**2).mean(axis=1))
    # Rounding turns a choice of experts over now and then, and this random model's experts differ in everything.
    assert 1e-4 < np.median(errors) < 0.2, errors


def test_activation_bits_must_be_eight(directory: Path) -> None:
    with pytest.raises(RequestError, match="activation_bits"), streamed(directory, activation_bits=4):
        pass

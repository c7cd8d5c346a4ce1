"""NaN and infinity in weights: on every path an error that names the layer; slots stay whole, the engine usable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from flash_moe_mlx import NonFiniteError, generate, load, stream_generate
from flash_moe_mlx.models import checks, decoder, moe_block
from flash_moe_mlx.ops.backend import backend, use_cpu_kernels
from flash_moe_mlx.ops.finite import is_finite

from ..support.models import make_small, smallest_limit, streamed
from ..support.switch_configs import make_config
from ..support.switch_models import write_model

PROMPT = list(range(1, 13))
LAYER = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def loaded(directory: Path) -> Any:
    model, tokenizer = load(directory, memory_limit=smallest_limit(directory))
    with model.streaming:
        yield model, tokenizer


def poison(owner: Any, name: str, value: float = float("nan")) -> Callable[[], None]:
    """Put a number into a weight; returns what takes it out again."""
    before = owner[name]
    after = np.array(before.astype(mx.float32))
    after.reshape(-1)[:] = value
    owner[name] = mx.array(after).astype(before.dtype)
    return lambda: owner.__setitem__(name, before)


def out_projection(model: Any, layer: int) -> Any:
    mixer = model.text_model.layers[layer].mixer
    return mixer.out_proj if mixer.weight_name == "linear_attn" else mixer.o_proj


PLACES: dict[str, tuple[Callable[[Any], tuple[Any, str]], int | None]] = {
    "embedding": (lambda m: (m.text_model.embed_tokens, "scales"), None),
    "mixer": (lambda m: (out_projection(m, LAYER), "scales"), LAYER),
    "norm": (lambda m: (m.text_model.layers[LAYER].input_layernorm, "weight"), LAYER),
    "router": (lambda m: (m.text_model.layers[LAYER].mlp.gate, "scales"), LAYER),
    "shared expert": (lambda m: (m.text_model.layers[LAYER].mlp.shared_expert.down_proj, "scales"), LAYER),
    "shared gate": (lambda m: (m.text_model.layers[LAYER].mlp.shared_expert_gate, "scales"), LAYER),
    "last shared expert": (lambda m: (m.text_model.layers[-1].mlp.shared_expert.down_proj, "scales"), -1),
    "output projection": (lambda m: (m.output_projection, "scales"), None),
}
BEHIND_ROUTERS = ("last shared expert", "output projection")
"""Places that no router sees. Of these numbers the model looks at those of a CPU, and generation at those of a GPU."""


def seen_by_model(place: str) -> bool:
    return backend() == "cpu" or place not in BEHIND_ROUTERS


def slots_whole(model: Any) -> bool:
    """Return whether every slot is free or holds an expert."""
    layers = model.streaming.debug_state().layers.values()
    return all(sorted([*t.free, *t.present.values(), *t.filling.values()]) == list(range(t.num_slots)) for t in layers)


def check(model: Any, place: str, call: Callable[[], Any]) -> None:
    where, layer = PLACES[place]
    expected = None if layer is None else layer % len(model.layers)
    owner, name = where(model)
    restore = poison(owner, name)
    for _ in range(3):
        with pytest.raises(NonFiniteError, match="finite") as raised:
            call()
        assert raised.value.layer == expected
        assert slots_whole(model)
    restore()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tapes", [True, False], ids=["tapes", "mlx"])
def test_decode_names_the_layer(place: str, tapes: bool, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    if not tapes:
        monkeypatch.setattr(decoder.HybridModel, "_decoder", lambda self: None)
    expected = generate(model, tokenizer, PROMPT, max_tokens=4)

    def decode() -> None:
        model(mx.array([PROMPT[:1]]), cache=cache)

    cache = model.make_cache()
    mx.eval(model(mx.array([PROMPT]), cache=cache, logits_to_keep=1))
    check(model, place, decode if seen_by_model(place) else lambda: generate(model, tokenizer, PROMPT[:1]))
    assert generate(model, tokenizer, PROMPT, max_tokens=4) == expected


@pytest.mark.parametrize("place", PLACES)
def test_every_other_path_names_it_too(place: str, loaded: Any) -> None:
    model, tokenizer = loaded
    expected = generate(model, tokenizer, PROMPT, max_tokens=4)
    check(model, place, lambda: generate(model, tokenizer, PROMPT, max_tokens=4))
    if seen_by_model(place):
        check(model, place, lambda: mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=4))
        check(model, place, lambda: mlx_lm.batch_generate(model, tokenizer, [PROMPT, PROMPT[:5]], max_tokens=4))
        check(model, place, lambda: model(mx.array([PROMPT]), logits_to_keep=2))
    assert generate(model, tokenizer, PROMPT, max_tokens=4) == expected


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_in_one_expert(value: float, loaded: Any) -> None:
    """An expert's record is poisoned where it lies in memory: every slot of a layer."""
    model, _ = loaded
    cache = model.make_cache()
    token = mx.array([PROMPT[:1]])
    mx.eval(model(token, cache=cache))
    table = model.streaming.debug_state().layers[LAYER]
    part = table.bank.layout.by_name["up_proj.scales"]
    for slot in range(table.num_slots):
        bits = np.frombuffer(table.bank.slot(slot), np.uint8)[part.offset : part.offset + part.nbytes].view(np.uint16)
        bits[:] = 0x7F80 if value == float("inf") else 0x7FC0
    with pytest.raises(NonFiniteError) as raised:
        model(token, cache=model.make_cache())
    assert raised.value.layer == LAYER
    assert slots_whole(model)
    model.streaming.clear()
    assert is_finite(model(token))


def test_what_the_last_mixer_keeps_is_looked_at(loaded: Any) -> None:
    model, _ = loaded
    owner = model.text_model.layers[-2].mlp.shared_expert.down_proj
    restore = poison(owner, "scales")
    with pytest.raises(NonFiniteError) as raised:
        model(mx.array([PROMPT]), cache=model.make_cache(), logits_to_keep=0)
    assert raised.value.layer == len(model.layers) - 2
    restore()


def test_masks_of_processors_are_no_fault(loaded: Any) -> None:
    model, tokenizer = loaded

    def only_seven(_: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == 7, logits, -mx.inf)

    tokens = [r.token for r in stream_generate(model, tokenizer, PROMPT, max_tokens=3, logits_processors=[only_seven])]
    assert tokens == [7, 7, 7]


def test_a_gpu_looks_after_the_pass(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's weights of a step are looked at when the pass is over; of logits that is generation's part."""
    model, tokenizer = loaded
    monkeypatch.setattr(decoder.HybridModel, "_decoder", lambda self: None)
    for module in (decoder, checks, moe_block):
        monkeypatch.setattr(module, "backend", lambda: "metal")
    expected = generate(model, tokenizer, PROMPT, max_tokens=2)
    for place in PLACES:
        check(model, place, lambda: generate(model, tokenizer, PROMPT, max_tokens=2))
        # What was noted while the layer was looked for is none of a later prompt's numbers.
        assert generate(model, tokenizer, PROMPT, max_tokens=2) == expected
    with pytest.raises(ValueError, match="token ids"):
        model(mx.array([[10**9]]))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_models_with_a_switch_glu(model_type: str, tmp_path: Path) -> None:
    with streamed(write_model(tmp_path, make_config(model_type)), max_context=128) as model:
        ids = mx.array([PROMPT])
        before = np.array(model(ids, logits_to_keep=1).astype(mx.float32))
        last = len(model.layers) - 1
        for layer in (0, last):
            restore = poison(model.layers[layer].self_attn.o_proj, "weight")
            step = [lambda: model(ids[:, :1])] if backend() == "cpu" else []  # on a GPU generation looks at a step
            for call in (lambda: model(ids, logits_to_keep=1), *step):
                with pytest.raises(NonFiniteError) as raised:
                    call()
                assert raised.value.layer == layer
            restore()
            assert slots_whole(model)
        assert np.array_equal(np.array(model(ids, logits_to_keep=1).astype(mx.float32)), before)
        with pytest.raises(ValueError, match="token ids"):
            model(mx.array([[model.vocabulary_size]]))


@pytest.mark.skipif(not use_cpu_kernels(), reason="the CPU kernels are not in use")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rounding_to_8_bits_hides_nothing(value: float) -> None:
    from flash_moe_mlx.ops.cpu.int8_ir import round_to_int8

    x = np.linspace(-1, 1, 128, dtype=np.float32)
    rounded, sums = np.zeros(128, np.int8), np.zeros((2, 2), np.float32)
    round_to_int8(x, 64, rounded, sums)
    assert np.isfinite(sums).all()
    x[100] = value
    round_to_int8(x, 64, rounded, sums)
    assert not np.isfinite(sums[1, 1]) and np.isfinite(sums[:, 0]).all()

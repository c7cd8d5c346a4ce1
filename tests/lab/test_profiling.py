"""profile(): its seconds are those that passed, in the phase where they passed, and the model is as before."""

import time
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import pytest

from flash_moe_mlx.lab.profiling import PHASES, Profile, profile
from flash_moe_mlx.runtime.loading import load_model

from ..support.faulty_models import replace_store
from ..support.models import make_converted, make_small
from ..support.switch_configs import make_config
from ..support.switch_models import write_model

DEMO = Path(str(files("flash_moe_mlx") / "demo"))
PROMPT = mx.array([[5, 6, 7, 8, 9]])


def run(model: object) -> list[float]:
    cache = model.make_cache()
    logits = model(PROMPT, cache=cache)
    for _ in range(3):
        logits = model(logits[:, -1:].argmax(-1), cache=cache)
    return logits[0, -1].tolist()


def test_the_phases_are_the_time_that_passed():
    model = load_model(DEMO, memory_limit="14MB", max_context=128)
    with model.streaming:
        expected = run(model)
        classes = [type(module) for _, module in model.named_modules()]
        with profile(model) as found:
            started = time.perf_counter()
            assert run(model) == pytest.approx(expected, rel=1e-3, abs=1e-3)
            elapsed = time.perf_counter() - started
        assert [type(module) for _, module in model.named_modules()] == classes
        seconds = sum(found.prefill.values()) + sum(found.decode.values())
        assert 0.5 * elapsed < seconds <= elapsed
        assert (found.prefill_tokens, found.decode_tokens) == (5, 3)
        assert all(found.decode[phase] > 0 for phase in PHASES if phase != "I/O wait")
        run(model)
        assert found.decode_tokens == 3, "it ends with the block"


def test_waiting_for_reads_is_no_computing(tmp_path: Path):
    model = load_model(make_small(tmp_path), memory_limit="1GB", max_context=128)
    with model.streaming as engine:
        run(model)
        engine.clear()
        replace_store(engine, delay=0.3)
        with profile(model) as found:
            model(PROMPT)
        assert found.prefill["I/O wait"] > 0.6, "four layers read"
        assert found.prefill["I/O wait"] > found.prefill["experts"], "which would have it, were it not taken off"


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path):
    model = load_model(make_converted(tmp_path, bits=4), memory_limit="1GB", max_context=8)
    with model.streaming:
        classes = [type(module) for _, module in model.named_modules()]
        with pytest.raises(Exception, match="max_context"), profile(model):
            model(mx.zeros((1, 9), mx.int32))
        assert [type(module) for _, module in model.named_modules()] == classes
        model(PROMPT)


def test_models_of_mlx_lm(tmp_path: Path):
    model = load_model(write_model(tmp_path, make_config("mixtral"), "4-bit g64"), memory_limit="1GB", max_context=64)
    with model.streaming:
        with profile(model) as found:
            model(PROMPT)
        assert {phase for phase, seconds in found.prefill.items() if seconds > 0} >= {"attention", "experts", "lm_head"}


def test_it_renders():
    found = Profile()
    assert "-" in str(found)
    found.decode["attention"], found.decode["experts"], found.decode_tokens = 0.03, 0.01, 10
    assert "3.00 (75%)" in str(found) and "4.00 (100%)" in str(found)
    assert '<td style="text-align: left">1.00 (25%)</td>' in found._repr_html_()

"""The adaptor for lm_eval: its answers are ours. Where lm_eval is not installed, only that it says so."""

import math
import sys
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flash_moe_mlx import generate, load
from flash_moe_mlx.errors import RequestError
from flash_moe_mlx.lab.scoring import ContinuationScorer

DEMO = Path(str(files("flash_moe_mlx") / "demo"))
QUESTION = "What is 17 + 25?"
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm_eval: pip install 'flash_moe_mlx[eval]'"
)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_without_lm_eval_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "flash_moe_mlx.lab.harness", raising=False)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RequestError, match=r"\[lm_eval\] is not installed.*\[.*eval"):
        import_module("flash_moe_mlx.lab.harness")


@pytest.fixture(scope="module")
def harness() -> Any:
    from lm_eval.api.registry import get_model

    import_module("flash_moe_mlx.lab.harness")
    model = get_model("flash_moe_mlx").create_from_arg_string(f"pretrained={DEMO},memory_limit=60MB,max_length=64")
    yield model
    model._model.streaming.close()


@pytest.fixture(scope="module")
def own() -> Any:
    model, tokenizer = load(DEMO, memory_limit="60MB", max_context=64)
    with model.streaming:
        yield model, tokenizer


@needs_lm_eval
def test_log_likelihoods(harness: Any, own: Any):
    model, tokenizer = own
    scorer = ContinuationScorer(model)
    pairs = [(QUESTION, " 42"), (QUESTION + " ", "41"), ("", "Hello")]
    for (context, text), found in zip(pairs, harness.loglikelihood(requests(*pairs), disable_tqdm=True), strict=True):
        whole = tokenizer.encode(context + text, add_special_tokens=False)
        before = len(tokenizer.encode(context.rstrip(), add_special_tokens=False))
        start = whole[:before] or [tokenizer.eos_token_id]
        assert found == scorer.score(start, whole[before:])


@needs_lm_eval
def test_texts_longer_than_the_context_are_scored_in_windows(harness: Any, own: Any):
    model, tokenizer = own
    text = "Ana has a red kite and a small dog that likes the sea. " * 4
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert 64 < len(tokens) < 128
    (found,) = harness.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    scorer = ContinuationScorer(model)
    total = scorer.score([tokenizer.eos_token_id], tokens[:64])[0]
    rest = tokens[64:]
    window = tokens[-65:]  # a full window, of which the rest is scored
    total += scorer.score(window[: -len(rest)], rest)[0]
    assert found == pytest.approx(total) and math.isfinite(found)
    with pytest.raises(RequestError, match=r"\[max_length\]"):
        harness._loglikelihood_tokens([(None, [5], [7] * 65)], disable_tqdm=True)


@needs_lm_eval
def test_answers_end_before_a_stop(harness: Any, own: Any):
    model, tokenizer = own
    asked = {"until": ["<|im_end|>", "2"], "max_gen_toks": 16}
    plain = {"until": [], "max_gen_toks": 16, "do_sample": False}
    cut, whole = harness.generate_until(requests((QUESTION, asked), (QUESTION, plain)), disable_tqdm=True)
    assert whole == generate(model, tokenizer, QUESTION, max_tokens=16) and "2" in whole
    assert cut == whole.partition("2")[0]
    chat = harness.apply_chat_template([{"role": "user", "content": QUESTION}])
    assert chat.endswith("<|im_start|>assistant\n") and harness.get_model_info()["lossy"] == []

"""quality(): its figures are those computed from whole logits; it resumes, stays within its limit, and refuses."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import Quality, load, quality
from flash_moe_mlx.errors import MemoryLimitError, RequestError
from flash_moe_mlx.lab import quality_run
from flash_moe_mlx.progress import Progress

from ..support.command_line import document, refusal, succeed
from ..support.models import make_converted, smallest_limit, write_tokenizer
from ..support.numerics import floats
from ..support.switch_configs import make_config
from ..support.switch_models import write_model

TEXT = "The quick brown fox jumps over the lazy dog; nobody knows why, least of all the dog.\n" * 3
WINDOW = 48
LIMIT = "100MB"
HOW: dict[str, Any] = {"window": WINDOW, "memory_limit": LIMIT, "progress": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("source"), bits=8)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("coarse"), bits=4)


@pytest.fixture(scope="module")
def whole(source: Path, coarse: Path) -> Quality:
    """The coarse checkpoint against the source."""
    return quality(coarse, TEXT, against=source, **HOW)


def log_probabilities(path: Path, text: str = TEXT, **how: Any) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Log-probabilities of each window's tokens but the first, from whole logits, and these tokens."""
    model, tokenizer = load(path, memory_limit=LIMIT, max_context=WINDOW, **how)
    with model.streaming:
        tokens = tokenizer.encode(text)
        for start in range(0, len(tokens), WINDOW):
            part = tokens[start : start + WINDOW]
            logits = floats(model(mx.array([part]), logits_to_keep=len(part)))[0, :-1].astype(np.float64)
            yield logits - np.log(np.exp(logits).sum(-1, keepdims=True)), part[1:]


def picked(pairs: list[tuple[np.ndarray, list[int]]]) -> float:
    """Mean negative log-likelihood."""
    return -float(np.mean([row[token] for rows, tokens in pairs for row, token in zip(rows, tokens, strict=True)]))


def test_perplexity_is_that_of_whole_logits(source: Path):
    found = quality(source, TEXT, **HOW)
    pairs = list(log_probabilities(source))
    assert len(pairs) == found.windows == 6 and found.tokens == sum(len(tokens) for _, tokens in pairs)
    assert found.perplexity == pytest.approx(math.exp(picked(pairs)), rel=1e-6)
    means = [picked([pair]) for pair in pairs]
    low, high = found.perplexity_interval
    assert low < found.perplexity < high < math.exp(max(means)) * 2
    assert found.kl_divergence is found.top1_agreement is found.against is None
    assert "nats" not in str(found) and "perplexity" in found._repr_html_()


@pytest.mark.parametrize("settings", [{}, {"num_experts_per_tok": 1}], ids=["another checkpoint", "another K"])
def test_a_comparison_is_that_of_whole_logits(source: Path, coarse: Path, whole: Quality, settings: dict[str, int]):
    model = source if settings else coarse
    found = quality(model, TEXT, against=source, **settings, **HOW) if settings else whole
    own, other = list(log_probabilities(model, **settings)), list(log_probabilities(source))
    p, q = (np.concatenate([rows for rows, _ in pairs]) for pairs in (other, own))
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert found.kl_divergence == pytest.approx(kl.mean(), rel=1e-5) and found.kl_divergence > 1e-4
    assert found.max_kl_divergence == pytest.approx(kl.max(), rel=1e-5)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean()) and found.top1_agreement < 1
    assert found.perplexity == pytest.approx(math.exp(picked(own)), rel=1e-6)
    assert found.reference_perplexity == pytest.approx(math.exp(picked(other)), rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(found.perplexity / found.reference_perplexity)
    for name in ("kl_divergence", "top1_agreement", "perplexity_ratio"):
        low, high = getattr(found, f"{name}_interval")
        assert low <= getattr(found, name) <= high
    assert bool(found.lossy) == bool(settings)


def test_a_checkpoint_does_not_differ_from_itself(source: Path):
    found = quality(source, TEXT, against=source, **HOW)
    assert (found.kl_divergence, found.max_kl_divergence, found.top1_agreement) == (0, 0, 1)
    assert found.perplexity_ratio == 1


def test_one_model_is_loaded_at_a_time_and_no_more_often_than_needed(
    source: Path, coarse: Path, whole: Quality, monkeypatch: pytest.MonkeyPatch
):
    engines: list[Any] = []
    loaded: list[str] = []

    def counted(**how: Any) -> Any:
        assert all("closed" in repr(engine) for engine in engines), "the other one is still loaded"
        result = load(**how)
        engines.append(result[0].streaming)
        loaded.append(Path(how["path_or_repo"]).parent.name)
        return result

    monkeypatch.setattr(quality_run, "load", counted)
    parts = quality(coarse, TEXT, against=source, scratch=2 * 4 * 320 * WINDOW, **HOW)
    assert parts == whole
    assert [name.rstrip("0123456789") for name in loaded] == ["coarse", "source", "coarse", "source"], "six windows"
    assert all("closed" in repr(engine) for engine in engines)


def test_steps_predict_as_decoding_does(coarse: Path):
    text = TEXT[:60]
    at_once = quality(coarse, text, **HOW)
    stepped = quality(coarse, text, step=1, activation_bits=8, against=coarse, **HOW)
    assert stepped.reference_perplexity != at_once.perplexity, "other products"
    assert stepped.reference_perplexity == pytest.approx(at_once.perplexity, rel=1e-4)
    assert stepped.kl_divergence > 1e-7 and stepped.lossy == ("8-bit activations in decode",)


def stopping(after: int) -> Any:
    """A watcher that interrupts at a window."""
    seen: list[Progress] = []

    def watch(moment: Progress) -> None:
        if moment.unit == "tokens":
            seen.append(moment)
        if len(seen) == after:
            raise KeyboardInterrupt

    return watch


def test_it_resumes_with_the_same_figures(source: Path, coarse: Path, whole: Quality, tmp_path: Path):
    how = {**HOW, "against": source, "scratch": 2 * 4 * 320 * WINDOW}
    journal = tmp_path / "windows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        quality(coarse, TEXT, journal=journal, **{**how, "progress": stopping(5)})
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2, "two windows of the first round"
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-7])  # a crash cut the last line off
    seen: list[Progress] = []
    assert quality(coarse, TEXT, journal=journal, **{**how, "progress": seen.append}) == whole
    assert {moment.done for moment in seen if moment.unit == "tokens"} == {WINDOW * i for i in range(1, 6)}
    assert list(tmp_path.iterdir()) == [journal], "the temporary file is gone"
    assert quality(coarse, TEXT, journal=journal, **how) == whole, "nothing is left to do"
    with pytest.raises(RequestError, match=r"\[quality\] .* must be resumed with the same window, got 50 where"):
        quality(coarse, TEXT, journal=journal, **{**how, "window": 50})
    with pytest.raises(RequestError, match="same model"):
        quality(source, TEXT, journal=journal, **how)


def test_another_file_is_no_journal_and_stays_as_it_is(source: Path, tmp_path: Path):
    for content in (b"some notes", b'{"a": 1}\n', b"[]\n"):
        (tmp_path / "notes").write_bytes(content)
        with pytest.raises(RequestError, match="must be a journal"):
            quality(source, TEXT, journal=tmp_path / "notes", **HOW)
        assert (tmp_path / "notes").read_bytes() == content


def test_the_limit_counts_the_logits(source: Path):
    least = smallest_limit(source, max_context=WINDOW + 1)
    with pytest.raises(MemoryLimitError):
        quality(source, TEXT, **{**HOW, "memory_limit": least + 1000})
    limit = least + 40 * 4 * 320 * 2 + 4 * 320 * 200
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    quality(source, TEXT, **{**HOW, "memory_limit": limit})
    assert mx.get_peak_memory() - before <= limit
    mx.clear_cache()
    assert mx.get_active_memory() - before < 100_000, "the model's memory is returned"


def test_models_of_mlx_lm(tmp_path: Path):
    path = write_model(tmp_path, make_config("mixtral", vocab_size=320), "4-bit g64")
    write_tokenizer(path)
    found = quality(path, TEXT[:90], **HOW)
    assert found.perplexity == pytest.approx(math.exp(picked(list(log_probabilities(path, TEXT[:90])))), rel=1e-3)


def test_refusals(source: Path, tmp_path: Path):
    for name, value in (("window", 1), ("step", 0), ("max_tokens", True), ("scratch", "much")):
        with pytest.raises(RequestError, match=rf"\[{name}\]"):
            quality(source, TEXT, **{**HOW, name: value})
    with pytest.raises(RequestError, match="at least two tokens"):
        quality(source, "a", **HOW)
    other = make_converted(tmp_path, bits=4)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RequestError, match=r"\[against\] must be a checkpoint with the model's tokenizer"):
        quality(source, TEXT, against=other, **HOW)


def test_the_command(source: Path, coarse: Path, whole: Quality, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    options = (str(text), "-m", str(coarse), "--window", str(WINDOW), "--memory-limit", LIMIT)
    told = document("quality", *options, "--against", str(source), "--json")
    assert told == json.loads(json.dumps(whole.to_json())) and told["kl_divergence"] == whole.kl_divergence
    printed = succeed("quality", *options, "--against", "self", "--num-experts-per-tok", "1", "--max-tokens", "40")
    assert "same likeliest token" in printed and "num_experts_per_tok=1" in printed
    text.write_bytes(b"\xff\xfe")
    assert "must be UTF-8" in refusal("quality", *options)

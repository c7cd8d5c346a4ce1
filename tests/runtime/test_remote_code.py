"""Checkpoints that bring Python files of their own: run only when they are trusted, and in no other case."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest

from flash_moe_mlx import (
    CheckpointError,
    CorruptError,
    FlashMoEError,
    MissingTensorError,
    RequestError,
    UnsupportedModelError,
    load,
    load_model,
    plan,
)

from ..support.models import make_small
from ..support.numerics import RELATIVE_RMS, assert_close
from ..support.switch_configs import make_config
from ..support.switch_models import write_model

TOKENIZER = """
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {"vocab_file": "vocab.own"}

    def __init__(self, vocab_file=None, **kw):
        kw.pop("tokenizer_object", None)
        super().__init__(tokenizer_object=Tokenizer.from_file(vocab_file), **kw)
"""
MODEL = """
import sys
from dataclasses import dataclass
from mlx_lm.models import olmoe

sys.ran_own_model = True


@dataclass
class ModelArgs(olmoe.ModelArgs):
    own_scale: float = 1.0


class Model(olmoe.Model):
    def __call__(self, inputs, cache=None):
        return super().__call__(inputs, cache) * self.args.own_scale
"""


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    directory = make_small(tmp_path / "model")
    (directory / "tokenizer.json").rename(directory / "vocab.own")
    (directory / "tokenization_own.py").write_text(TOKENIZER)
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        "tokenizer_class": "OwnTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|end|>"}))
    return directory


@pytest.fixture
def with_model(tmp_path: Path) -> Path:
    directory = write_model(tmp_path / "model", make_config("olmoe", model_file="own.py", own_scale=2.0))
    (directory / "own.py").write_text(MODEL)
    sys.__dict__.pop("ran_own_model", None)
    return directory


def test_a_tokenizer_of_its_own(with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked on the terminal"))
    how: dict[str, Any] = {"memory_limit": "1GB", "max_context": 64}
    with pytest.raises(CheckpointError, match=r"OwnTokenizer.*trust_remote_code=True \(--trust-remote-code\)"):
        load(with_tokenizer, **how)
    for trusted in ({"trust_remote_code": True}, {"tokenizer_config": {"trust_remote_code": True}}):
        model, tokenizer = load(with_tokenizer, **how, **trusted)  # type: ignore[misc]
        model.streaming.close()
        assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


def test_a_model_file_of_its_own(with_model: Path):
    with pytest.raises(
        UnsupportedModelError, match=r"model file own\.py\. If you trust it, pass trust_remote_code=True"
    ):
        load_model(with_model, memory_limit="1GB", max_context=64)
    assert not hasattr(sys, "ran_own_model")
    model = load_model(with_model, memory_limit="1GB", max_context=64, trust_remote_code=True)
    resident, _ = mlx_lm.utils.load_model(with_model, trust_remote_code=True)
    resident.set_dtype(mx.float32)
    ids = mx.array([[1, 2, 3, 4]])
    with model.streaming:
        assert_close("logits", resident(ids), model(ids), RELATIVE_RMS["mlx-lm"])
    report = plan(with_model, memory_limit="1GB", max_context=64, trust_remote_code=True, disk_bytes_per_second=1e9)
    assert report


@pytest.mark.parametrize(
    ("name", "text", "kind", "words"),
    [
        ("../own.py", MODEL, CorruptError, "must name a Python file"),
        (["own.py"], MODEL, CorruptError, "must name a Python file"),
        ("absent.py", MODEL, MissingTensorError, "no such file"),
        ("own.py", "Model = 1 / 0", UnsupportedModelError, "ZeroDivisionError"),
        ("own.py", "x = (", UnsupportedModelError, "SyntaxError"),
        ("own.py", "x = 1", UnsupportedModelError, "AttributeError"),
    ],
)
def test_model_files_that_are_none(with_model: Path, name: Any, text: str, kind: type[FlashMoEError], words: str):
    config = json.loads((with_model / "config.json").read_text())
    (with_model / "config.json").write_text(json.dumps({**config, "model_file": name}))
    (with_model / "own.py").write_text(text)
    with pytest.raises(kind, match=words):
        load_model(with_model, memory_limit="1GB", max_context=64, trust_remote_code=True)


def test_trust_is_true_or_false(with_model: Path):
    with pytest.raises(RequestError, match="trust_remote_code"):
        load_model(with_model, memory_limit="1GB", trust_remote_code="no")  # type: ignore[arg-type]

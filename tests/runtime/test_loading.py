"""load: files that change or can't be read while they are loaded, and end tokens."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flash_moe_mlx import StoreError, load
from flash_moe_mlx.runtime import loading
from flash_moe_mlx.storage import store

from ..support.models import EOS, make_small
from ..support.refusals import assert_refused

SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_small(tmp_path / "model")


def test_dense_weights_that_cannot_be_read(small: Path, monkeypatch: pytest.MonkeyPatch):
    """The file is cut after its headers were checked; a disk's read error looks the same to MLX."""
    check = loading.check_tensors

    def cut(*arguments: Any) -> None:
        check(*arguments)
        os.truncate(small / SECOND, 20_000)

    monkeypatch.setattr(loading, "check_tensors", cut)
    monkeypatch.setattr(store, "_check_size", lambda *_: None)
    assert_refused(lambda: load(small, memory_limit="1GB"), StoreError, "language_model.* must be read whole")


def test_a_file_that_vanishes_before_its_tensors_are_mapped(small: Path, monkeypatch: pytest.MonkeyPatch):
    lazy = loading._lazy_dense

    def vanish(checkpoint: Any) -> Any:
        (small / SECOND).unlink()
        return lazy(checkpoint)

    monkeypatch.setattr(loading, "_lazy_dense", vanish)
    assert_refused(lambda: load(small, memory_limit="1GB"), StoreError, SECOND)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_of_id_zero_ends(file: str, small: Path):
    config = json.loads((small / "config.json").read_text()) | {"eos_token_id": 5}
    (small / "config.json").write_text(json.dumps(config))
    settings = json.loads((small / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (small / "tokenizer_config.json").write_text(json.dumps(settings))
    (small / file).write_text(
        json.dumps({**config, "eos_token_id": EOS} if file == "config.json" else {"eos_token_id": EOS})
    )
    model, tokenizer, read = load(small, memory_limit="1GB", max_context=64, return_config=True)
    model.streaming.close()
    assert EOS in tokenizer.eos_token_ids and 5 not in tokenizer.eos_token_ids
    assert read["eos_token_id"] == EOS == 0

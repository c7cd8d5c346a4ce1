"""A checkpoint's JSON files, mutated at random and loaded: typed errors only, and no memory past the limit.

``pytest tests/formats/test_mutated_files.py --mutations 2000`` tries that many of each kind of checkpoint.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import flash_moe_mlx

from ..support.models import make_small, write_tokenizer
from ..support.switch_configs import make_config
from ..support.switch_models import write_model

ROOT = Path(__file__).parents[2]
SWITCH_TYPES = ("deepseek_v3", "qwen3_moe", "gpt_oss", "gemma4", "kimi_k3", "longcat_flash_ngram", "jamba", "step3p5")
IN_CI = 30
KINDS_IN_CI = 4


def _small(directory: Path) -> Path:
    make_small(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1], "temperature": 1.0}))
    return directory


def _packed(directory: Path) -> Path:
    source = _small(directory.with_name("source"))
    return flash_moe_mlx.pack(source, directory, progress=False)


def _switch(model_type: str, directory: Path) -> Path:
    write_model(directory, make_config(model_type), "4-bit g64")
    write_tokenizer(directory)
    return directory


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3_5_moe": _small,
    "packed": _packed,
    **{model_type: partial(_switch, model_type) for model_type in ("qwen3_next", *SWITCH_TYPES)},
}


@pytest.mark.skipif(sys.platform != "linux", reason="bounds a child's address space as Linux counts it")
@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_untyped_escapes(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    count = request.config.getoption("--mutations") or IN_CI
    if count == IN_CI and kind not in list(MAKERS)[:KINDS_IN_CI]:
        pytest.skip("one type of mlx-lm's stands for all; --mutations tries the others")
    source = MAKERS[kind](tmp_path / "model")
    seed = 1 + list(MAKERS).index(kind)
    command = [sys.executable, "-m", "tests.support.mutations", str(source), str(seed), str(count), str(tmp_path / "w")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["escaped"] == []
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) == count
    assert outcomes["CorruptError"] >= count / 10 and outcomes["loaded"] >= count / 20, outcomes
    assert not list(tmp_path.glob("core*"))

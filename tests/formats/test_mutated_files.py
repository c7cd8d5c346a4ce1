"""A checkpoint's JSON files and tensor headers, mutated at random and loaded: typed errors, no memory past the limit.

``pytest tests/formats/test_mutated_files.py --mutations 2000`` tries that many of each kind of checkpoint.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

import flash_moe_mlx
from flash_moe_mlx import CorruptError, UnsupportedModelError

from ..support.hub_layouts import FOREIGN, GLOBAL_SCALES, LAYOUTS, PACKED_FIRST, write_layout, write_tensors
from ..support.models import make_small, write_tokenizer
from ..support.refusals import assert_refused
from ..support.switch_configs import make_config
from ..support.switch_models import write_model

ROOT = Path(__file__).parents[2]
SWITCH_TYPES = ("deepseek_v3", "qwen3_moe", "gpt_oss", "gemma4", "kimi_k3", "longcat_flash_ngram", "jamba", "step3p5")
PUBLISHED = {**LAYOUTS, **FOREIGN, "global scales": GLOBAL_SCALES, **PACKED_FIRST}
IN_CI = 30
KINDS_IN_CI = ("qwen3_5_moe", "packed", "qwen3_next", "deepseek_v3", "AWQ")


def _small(directory: Path) -> Path:
    make_small(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1], "temperature": 1.0}))
    return directory


def _packed(directory: Path) -> Path:
    source = _small(directory.with_name("source"))
    return flash_moe_mlx.pack(source, directory, progress=False)


def _switch(model_type: str, directory: Path, conversion: str = "4-bit g64") -> Path:
    write_model(directory, make_config(model_type), conversion)
    write_tokenizer(directory)
    return directory


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3_5_moe": _small,
    "packed": _packed,
    **{model_type: partial(_switch, model_type) for model_type in ("qwen3_next", *SWITCH_TYPES)},
    **{mode: partial(_switch, "qwen3_moe", conversion=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")},
    **{name: partial(write_layout, layout=layout) for name, layout in PUBLISHED.items()},
}


@pytest.mark.skipif(sys.platform != "linux", reason="bounds a child's address space as Linux counts it")
@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_untyped_escapes(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    count = request.config.getoption("--mutations") or IN_CI
    if count == IN_CI and kind not in KINDS_IN_CI:
        pytest.skip("some types of mlx-lm's and published forms stand for all; --mutations tries the others")
    source = MAKERS[kind](tmp_path / "model")
    seed = 1 + list(MAKERS).index(kind)
    command = [sys.executable, "-m", "tests.support.mutations", str(source), str(seed), str(count), str(tmp_path / "w")]
    command += ["headers"] * (kind in PUBLISHED or kind in ("mxfp4", "mxfp8", "nvfp4"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["escaped"] == []
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) == count
    assert outcomes["CorruptError"] >= count / 10 and outcomes["loaded"] >= count / 20, outcomes
    assert not list(tmp_path.glob("core*"))


@pytest.mark.parametrize("layout", ["Mixtral", "AWQ of Mixtral"])
def test_integers_where_floats_belong(layout: str, tmp_path: Path):
    """Found so: by MLX's own error in the first pass, and by a KeyError in pack."""
    source = write_layout(tmp_path / "model", PUBLISHED[layout])
    tensors = mx.load(str(source / "model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(mx.int16)
    write_tensors(source, json.loads((source / "config.json").read_text()), tensors)
    use = partial(flash_moe_mlx.load_model, source, memory_limit="1GB")
    if layout in PACKED_FIRST:
        use = partial(flash_moe_mlx.pack, source, tmp_path / "packed", bits=None, progress=False)
    assert_refused(use, CorruptError, r"model\.norm\.weight must have floats, got mlx\.core\.int16")


def test_no_text_config_where_a_model_has_one(tmp_path: Path):
    source = write_layout(tmp_path / "model", PUBLISHED["Qwen3-VL"])
    (source / "config.json").write_text('{"model_type": "qwen3_vl_moe", "text_config": null}')
    use = partial(flash_moe_mlx.load_model, source, memory_limit="1GB")
    assert_refused(use, UnsupportedModelError, "must describe a qwen3_vl_moe model")

"""Models in the layouts and forms in which they are published, streamed, against mlx-lm's resident ones."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from flash_moe_mlx.formats.checkpoint import Checkpoint

from ..support.hub_layouts import FOREIGN, LAYOUTS, write_layout, write_tensors
from ..support.models import greedy, load_resident, smallest_limit, streamed
from ..support.numerics import assert_close
from ..support.switch_models import GREEDY_TOKENS, MAX_CONTEXT

TOLERANCE = 1e-4
VOCABULARY = 128


def check(directory: Path, resident: Any, ways: list[str]) -> None:
    """Logits within the tolerance, equal greedy tokens; the same bits at every budget and in every way of reading."""
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, VOCABULARY, 20).tolist()
    ids = mx.array(rng.integers(0, VOCABULARY, (1, 40)))
    expected, tokens = resident(ids), greedy(resident, prompt, GREEDY_TOKENS)[0]
    results = []
    for io in ["all", *ways]:
        limit = "1GB" if io == "all" else smallest_limit(directory, max_context=MAX_CONTEXT, io=io)
        with streamed(directory, limit, max_context=MAX_CONTEXT, io="auto" if io == "all" else io) as model:
            results.append(np.array(model(ids)))
            assert_close("logits", expected, results[-1], TOLERANCE)
            if io in ("all", ways[0]):
                assert greedy(model, prompt, GREEDY_TOKENS)[0] == tokens
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_mlx_lm(layout: str, tmp_path: Path):
    directory = write_layout(tmp_path, LAYOUTS[layout])
    ways = ["pread", "mmap", "direct"] if layout in ("gpt-oss", "Llama 4", "Nemotron-H") else ["pread"]
    check(directory, load_resident(directory), ways)


@pytest.mark.parametrize("layout", FOREIGN)
def test_matches_the_dequantised(layout: str, tmp_path: Path):
    """mlx-lm has no reader of these: the same weights, dequantised by the definition of the format."""
    directory = write_layout(tmp_path / "published", FOREIGN[layout])
    checkpoint = Checkpoint.open(directory)
    assert {q.stated.mode for _, q in checkpoint.layout(0).quantizations if q} == {"nvfp4"}
    tensors = mx.load(str(directory / "model.safetensors"))
    plain = {}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if ".experts." not in name:
            plain[name] = value
        elif part in ("weight", "weight_packed"):
            words, scales = value.view(mx.uint32), tensors[f"{module}.weight_scale"]
            weight = mx.dequantize(words, scales, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
            own, other = f"{module}.weight_scale_2", f"{module}.weight_global_scale"
            plain[f"{module}.weight"] = weight * tensors[own] if own in tensors else weight / tensors[other]
    config = {k: v for k, v in mlx_lm.utils.load_config(directory).items() if k != "quantization_config"}
    write_tensors(tmp_path / "plain", config, plain)
    check(directory, load_resident(tmp_path / "plain"), ["pread"])

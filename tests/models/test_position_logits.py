"""Logits of all positions of a pass: in blocks, with the bits of one call, and by our own products."""

from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx.errors import NonFiniteError
from flash_moe_mlx.models.layers import Embedding
from flash_moe_mlx.models.position_blocks import MIN_BLOCK, blocks
from flash_moe_mlx.ops.dequant_matvec import MAX_ROWS
from flash_moe_mlx.runtime.loading import load_model

from ..support.models import streamed
from ..support.numerics import floats
from ..support.switch_configs import make_config
from ..support.switch_models import write_model

DEMO = Path(str(files("flash_moe_mlx") / "demo"))
TOKENS = mx.array(np.random.default_rng(3).integers(0, 2048, (1, 60)).astype(np.uint32))
SMALL = 4 * 2048 * MIN_BLOCK  # bytes of the smallest block of the demo's logits


@pytest.fixture(scope="module")
def demo():
    model = load_model(DEMO, memory_limit="100MB", max_context=256)
    with model.streaming:
        yield model


def test_blocks_cover_all_positions_and_none_is_short():
    for start in (0, 5):
        for positions in range(1, 120):
            for size in (1, MIN_BLOCK, 20, 64):
                found = blocks(start, start + positions, size)
                assert [place for a, b in found for place in range(a, b)] == list(range(start, start + positions))
                assert max(b - a for a, b in found) <= max(size, MIN_BLOCK)
                assert positions <= MAX_ROWS or min(b - a for a, b in found) > MAX_ROWS


@pytest.mark.parametrize("keep", [None, 41, 9, 1])
def test_blocks_have_the_bits_of_one_call(demo, keep: int | None):
    whole = floats(demo(TOKENS, cache=demo.make_cache(), logits_to_keep=keep or 60))
    parts = [floats(part) for part in demo.position_logits(TOKENS, keep=keep, block_bytes=SMALL)]
    assert len(parts) == {None: 4, 41: 3}.get(keep, 1)
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_caches_advance_and_are_continued(demo):
    caches = demo.make_cache(), demo.make_cache()
    for start, end in ((0, 30), (30, 60)):
        part = TOKENS[:, start:end]
        whole = floats(demo(part, cache=caches[0], logits_to_keep=end - start))
        blocked = [floats(x) for x in demo.position_logits(part, caches[1], block_bytes=SMALL)]
        assert len(blocked) == 2 and np.array_equal(np.concatenate(blocked, axis=1), whole)


def test_numbers_that_are_not_finite_are_found_in_a_later_block(demo, monkeypatch: pytest.MonkeyPatch):
    own = Embedding.__call__
    calls = []

    def broken(self: Embedding, x: mx.array) -> mx.array:
        calls.append(x.shape[1])
        return own(self, x) * (mx.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(Embedding, "__call__", broken)
    found = demo.position_logits(TOKENS, block_bytes=SMALL)
    next(found)
    with pytest.raises(NonFiniteError) as refused:
        next(found)
    assert refused.value.token == calls[0], "the second block's first position"


def test_models_of_mlx_lm(tmp_path: Path):
    with streamed(write_model(tmp_path, make_config("mixtral"), "4-bit g64"), max_context=128) as model:
        tokens = TOKENS % model.vocabulary_size
        whole = floats(model(tokens, logits_to_keep=60))
        for keep in (None, 41):
            parts = [floats(part) for part in model.position_logits(tokens, keep=keep, block_bytes=1)]
            assert [part.shape[1] for part in parts] == ([15] * 4 if keep is None else [13, 14, 14])
            assert np.allclose(np.concatenate(parts, axis=1), whole[:, -(keep or 60) :], atol=2e-3)

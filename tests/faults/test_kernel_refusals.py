"""A kernel that the GPU's compiler refuses, wherever it is evaluated: one error that names message and switch."""

from pathlib import Path

import pytest

from flash_moe_mlx import generate
from flash_moe_mlx.errors import FlashMoEError
from flash_moe_mlx.runtime import steps

from ..support.models import make_small, with_fewest_slots

METAL = "[metal::Device] Unable to build metal library from source\nprogram_source:12:3: error: unknown type name"
WIDE = "[CustomKernel] Thread group size (512) is greater than the maximum allowed threads per threadgroup (448)"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("message", [METAL, WIDE])
def test_within_a_forward_pass(directory: Path, message: str):
    with with_fewest_slots(directory) as (model, tokenizer):
        with pytest.raises(FlashMoEError) as refused, model.streaming.forward_pass(1, 1, 1):
            raise RuntimeError(message)
        assert message in str(refused.value) and "FLASH_MOE_REFERENCE=1" in str(refused.value)
        assert generate(model, tokenizer, "Hi", max_tokens=2) is not None, "the engine stays usable"


def test_where_a_tokens_logits_are_evaluated(directory: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(caches: object) -> None:
        raise RuntimeError(METAL)

    with with_fewest_slots(directory) as (model, tokenizer):
        monkeypatch.setattr(steps, "pending_states", refuse)
        with pytest.raises(FlashMoEError, match="program_source:12:3"):
            generate(model, tokenizer, "Hi", max_tokens=2)


def test_other_errors_stay_what_they_are(directory: Path):
    with (
        with_fewest_slots(directory) as (model, _),
        pytest.raises(RuntimeError, match="something else"),
        model.streaming.forward_pass(1, 1, 1),
    ):
        raise RuntimeError("something else")

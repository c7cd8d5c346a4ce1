"""A small model that reads at nearly every step, and what it says when nothing disturbs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import flash_moe_mlx

from ..support.faulty_models import OTHER, PROMPT, Loaded, run
from ..support.models import make_converted, with_fewest_slots


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("checkpoint"), bits=4)


@pytest.fixture
def loaded(directory: Path) -> Iterator[Loaded]:
    with with_fewest_slots(directory) as pair:
        yield pair


@pytest.fixture(scope="module")
def expected(directory: Path) -> dict[int, list[int]]:
    """Tokens of an undisturbed model, by the prompt's length."""
    model, tokenizer = flash_moe_mlx.load(directory, memory_limit="1GB")
    with model.streaming:
        return {len(prompt): run((model, tokenizer), prompt) for prompt in (PROMPT, OTHER)}

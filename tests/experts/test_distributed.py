"""Experts shared by processes over MLX's ring: the bits of one process, and bounded ends of failures."""

from pathlib import Path

import numpy as np
import pytest

from flash_moe_mlx.experts.placement import Placement

from ..support.models import chat_config, make_converted, smallest_limit, streamed
from ..support.rank_child import digest_of, logits_of
from ..support.ranks import run_ranks

EXPERTS, K, LAYERS = 16, 3, range(4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = chat_config(num_experts=EXPERTS, num_experts_per_tok=K)
    return make_converted(tmp_path_factory.mktemp("checkpoint"), config=config, bits=4)


def test_ranks_give_the_bits_of_one(directory: Path, tmp_path: Path):
    """Prompts, single tokens and batches, with equal and uneven shares, and with the fewest slots."""
    with streamed(directory) as model:
        expected = digest_of(logits_of(model))
        everything = model.streaming.stats()
    uneven = tmp_path / "uneven.json"
    Placement(2, {layer: (np.arange(EXPERTS) == layer).astype(np.int64) for layer in LAYERS}).write(uneven)
    loads = [{}, {"shard": str(uneven)}, {"memory_limit": smallest_limit(directory)}, {"shard": False}]
    two = run_ranks(2, directory, tmp_path, {"do": "logits", "loads": loads})
    four = run_ranks(4, directory, tmp_path, {"do": "logits"})
    for rank in (*two, *four):
        assert rank.status == 0, rank.stderr
        assert [result["digest"] for result in rank.results] == [expected] * len(rank.results)
    shares = [[result["num_experts"] for result in rank.results] for rank in two]
    assert shares == [[32, 60, 32, 64], [32, 4, 32, 64]]
    for number in (0, 1):  # each rank reads its own experts once, where all of them fit
        read = [rank.results[number]["bytes_read"] for rank in two]
        assert sum(read) == everything.bytes_read and min(read) > 0
    assert [rank.results[0]["num_experts"] for rank in four] == [16] * 4

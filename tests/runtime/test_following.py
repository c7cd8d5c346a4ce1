"""Ranks that follow rank 0: the same tokens as in one process, through caches, cancellation and resizing."""

from pathlib import Path

from flash_moe_mlx import load

from ..support.models import chat_config, make_converted
from ..support.rank_child import led_work
from ..support.ranks import ranks_running


def test_ranks_follow_generations_cancellation_and_resizing(tmp_path: Path):
    directory = make_converted(tmp_path, config=chat_config(num_experts=16, num_experts_per_tok=3), bits=4)
    model, tokenizer = load(directory, memory_limit="300MB")
    with model.streaming:
        expected = led_work(model, tokenizer)
    assert expected[2] == "cancelled"
    with ranks_running() as ranks:
        ended = ranks.run(2, directory, tmp_path, {"do": "lead", "loads": [{"memory_limit": "300MB"}]})
    assert [rank.status for rank in ended] == [0, 0], [rank.stderr for rank in ended]
    assert ended[0].results[0]["done"] == expected, ended
    assert [rank.results[0]["limit"] for rank in ended] == [270_000_000] * 2

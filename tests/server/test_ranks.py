"""A server on several ranks: the answers of one process, and an end of all when one ends."""

import os
import re
import signal
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from flash_moe_mlx import load

from ..support.rank_child import ask
from ..support.ranks import Ranks, ranks_running

DEMO = Path(str(files("flash_moe_mlx") / "demo"))
SERVE = {"arguments": ["serve", "--port", "0"]}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with ranks_running() as running:
        yield running


def wait_for_server(messages: Path) -> None:
    started = time.monotonic()
    while not re.search("Serving demo", messages.read_text() if messages.exists() else ""):
        assert time.monotonic() - started < 120, messages.read_text()
        time.sleep(0.1)


def test_clients_get_the_answers_of_one_process(tmp_path: Path, ranks: Ranks):
    model, tokenizer = load(DEMO)
    with model.streaming:
        expected = ask(model, tokenizer)
    assert "42" in expected[0] and expected[0] == expected[2]
    ended = ranks.run(2, DEMO, tmp_path, {"do": "serve"})
    assert [rank.status for rank in ended] == [0, 0], [rank.stderr for rank in ended]
    assert ended[0].results[0]["texts"] == expected


def test_the_server_ends_when_a_rank_dies(tmp_path: Path, ranks: Ranks):
    def kill(pids: list[int], messages: list[Path]) -> None:
        wait_for_server(messages[0])
        os.kill(pids[1], signal.SIGKILL)

    ended = ranks.run(2, DEMO, tmp_path, {"do": "command", "numba": False, "loads": [SERVE]}, during=kill)
    assert [rank.status for rank in ended] == [2, -signal.SIGKILL], ended
    assert "rank 1 has died" in ended[0].stderr and "Application shutdown failed" not in ended[0].stderr


def test_an_interrupt_of_rank_0_ends_all(tmp_path: Path, ranks: Ranks):
    def interrupt(pids: list[int], messages: list[Path]) -> None:
        wait_for_server(messages[0])
        os.kill(pids[0], signal.SIGINT)

    ended = ranks.run(2, DEMO, tmp_path, {"do": "command", "numba": False, "loads": [SERVE]}, during=interrupt)
    assert ended[1].status == 0 and ended[0].status in (0, 130), ended

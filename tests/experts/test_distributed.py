"""Experts shared by processes over MLX's ring: the bits of one process, and bounded ends of failures."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from flash_moe_mlx import pack
from flash_moe_mlx.experts.placement import Placement
from flash_moe_mlx.experts.rank_methods import RankMethods

from ..support.models import chat_config, logits_of, make_converted, smallest_limit, streamed
from ..support.rank_child import digest_of, with_mlx_lm
from ..support.ranks import Ranks, ranks_running

EXPERTS, K, LAYERS = 16, 3, range(4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = chat_config(num_experts=EXPERTS, num_experts_per_tok=K)
    return make_converted(tmp_path_factory.mktemp("checkpoint"), config=config, bits=4)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with ranks_running() as running:
        yield running


def test_ranks_give_the_bits_of_one(directory: Path, tmp_path: Path, ranks: Ranks):
    """Prompts, single tokens and batches, with equal and uneven shares, and with the fewest slots."""
    with streamed(directory) as model:
        expected = digest_of(logits_of(model))
        everything = model.streaming.stats()
    uneven = tmp_path / "uneven.json"
    Placement(2, {layer: (np.arange(EXPERTS) == layer).astype(np.int64) for layer in LAYERS}).write(uneven)
    loads = [{}, {"shard": str(uneven)}, {"memory_limit": smallest_limit(directory)}, {"shard": False}]
    two = ranks.run(2, directory, tmp_path, {"do": "logits", "loads": loads})
    four = ranks.run(
        4, directory, tmp_path, {"do": "logits", "loads": [{}, {"memory_limit": smallest_limit(directory)}]}
    )
    for rank in (*two, *four):
        assert rank.status == 0, rank.stderr
        assert [result["digest"] for result in rank.results] == [expected] * len(rank.results)
    shares = [[result["num_experts"] for result in rank.results] for rank in two]
    assert shares == [[32, 60, 32, 64], [32, 4, 32, 64]]
    for number in (0, 1):  # each rank reads its own experts once, where all of them fit
        read = [rank.results[number]["bytes_read"] for rank in two]
        assert sum(read) == everything.bytes_read and min(read) > 0
    assert [rank.results[0]["num_experts"] for rank in four] == [16] * 4


def test_ranks_with_only_their_own_experts_give_the_bits_of_one(directory: Path, tmp_path: Path, ranks: Ranks):
    """Each has its share of a packing on disk, placed by a plan; then rank 1 has rank 0's."""
    with streamed(directory) as model:
        expected = digest_of(logits_of(model))
    plan, folder = tmp_path / "plan.json", tmp_path / "packed"
    Placement(2, {layer: (np.arange(EXPERTS) % 5 == layer).astype(np.int64) for layer in LAYERS}).write(plan)
    for rank in (0, 1):
        pack(directory, folder / f"{rank}-of-2", bits=None, shard=f"{rank}/2", placement=plan)
    for rank in ranks.run(2, folder, tmp_path, {"do": "logits", "loads": [{"verify": "full"}]}):
        assert rank.status == 0 and rank.results[0]["digest"] == expected, rank.stderr
    what = {"do": "logits", "numba": False, "directories": {"1": str(folder / "0-of-2")}}
    ended = ranks.run(2, folder, tmp_path, what)
    assert [rank.results[0]["error"] for rank in ended] == ["DistributedError", "RequestError"]
    assert all("got share 0 of 2 for rank 1 of 2" in rank.results[0]["message"] for rank in ended)


def test_ranks_sample_the_same_tokens(directory: Path, tmp_path: Path, ranks: Ranks):
    ended = ranks.run(2, directory, tmp_path, {"do": "tokens", "numba": False})
    assert all(rank.status == 0 for rank in ended), [rank.stderr for rank in ended]
    tokens = [rank.results[0]["tokens"] for rank in ended]
    assert tokens[0] == tokens[1] and len(set(tokens[0])) > 1


def test_mlx_lm_generates_on_uneven_ranks(directory: Path, tmp_path: Path, ranks: Ranks):
    uneven = tmp_path / "uneven.json"
    Placement(2, {layer: (np.arange(EXPERTS) < 3).astype(np.int64) for layer in LAYERS}).write(uneven)
    expected = with_mlx_lm(str(directory), {})
    for rank in ranks.run(2, directory, tmp_path, {"do": "mlx_lm", "loads": [{"shard": str(uneven)}]}):
        assert rank.results == [expected], rank.stderr


FAULTS = {  # exchanges 0 to 3 are the prompt's
    "killed-in-a-prompt": {"rank": 1, "kind": "kill", "at": 1},
    "killed-in-decode": {"rank": 1, "kind": "kill", "at": 10},
    "rank-0-killed": {"rank": 0, "kind": "kill", "at": 10},
    "killed-while-loading": {"rank": 1, "kind": "kill", "at": "load"},
    "cannot-read": {"rank": 1, "kind": "read", "at": 9},
    "interrupted": {"rank": 0, "kind": "interrupt", "at": 9},
    "frozen": {"rank": 1, "kind": "freeze", "at": 9},
    "hangs": {"rank": 0, "kind": "hang", "at": 9},
}
TIMEOUT = 8.0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_ends_all_with_a_typed_error(directory: Path, tmp_path: Path, ranks: Ranks, fault: str):
    own = FAULTS[fault]["rank"]
    what = {"do": "logits", "numba": False, "fault": FAULTS[fault], "loads": [{"rank_timeout": TIMEOUT}]}
    ended_by = own if FAULTS[fault]["kind"] in ("freeze", "hang") else None
    ended = ranks.run(2, directory, tmp_path, what, ended_by=ended_by)
    struck, other = ended[own], ended[1 - own]
    assert [result["error"] for result in other.results] == ["DistributedError"], other.stderr
    at = float(struck.stderr.split("struck ")[1].split()[0])
    bound = TIMEOUT if FAULTS[fault]["kind"] in ("freeze", "hang") else 2.0
    assert other.results[0]["at"] - at < bound + 4.0  # seconds for a busy machine
    if FAULTS[fault]["kind"] == "read":
        assert struck.results[0]["error"] == "StoreError" and "the disk must be whole" in other.results[0]["message"]


@pytest.mark.parametrize("own", [0, 1])
def test_a_rank_that_dies_while_mlx_connects_ends_the_other(directory: Path, tmp_path: Path, ranks: Ranks, own: int):
    """Rank 0 waits for a caller, which an alarm ends; rank 1 calls rank 0 for 31 seconds, which no signal ends."""
    fault = {"rank": own, "kind": "kill", "at": "connect"}
    ended = ranks.run(2, directory, tmp_path, {"do": "logits", "numba": False, "fault": fault})
    struck, other = ended[own], ended[1 - own]
    assert other.seconds - struck.seconds < 20  # two, and more on a busy machine
    if own == 1:
        assert [result["error"] for result in other.results] == ["DistributedError"], other.stderr
    else:
        assert other.status == 1 and "in _initialise" in other.stderr, other.stderr


def test_what_mlx_reports_late_does_not_hide_why_ranks_failed(monkeypatch: pytest.MonkeyPatch):
    def clear_cache() -> None:
        raise RuntimeError("[ring] connection to a peer was lost")

    monkeypatch.setattr(mx, "clear_cache", clear_cache)
    engine = RankMethods()
    for share in (None, SimpleNamespace(ranks=SimpleNamespace(failed=False))):
        engine._share = share
        with pytest.raises(RuntimeError, match="connection to a peer"):
            engine.free_buffers()
    engine._share = SimpleNamespace(ranks=SimpleNamespace(failed=True))
    engine.free_buffers()


def test_ranks_that_are_not_alike_are_refused(directory: Path, tmp_path: Path, ranks: Ranks):
    other = make_converted(tmp_path, config=chat_config(num_experts=EXPERTS, num_experts_per_tok=K), bits=4, seed=1)
    what = {"do": "logits", "numba": False, "directories": {"1": str(other)}}
    for rank in ranks.run(2, directory, tmp_path, what):
        assert rank.results[0]["error"] == "DistributedError" and "checkpoint" in rank.results[0]["message"]

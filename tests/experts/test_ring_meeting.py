"""Ranks of a ring that meet before MLX connects them: together, or not at all and at once."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from benchmarks.ring import rank_environments

from flash_moe_mlx.errors import DistributedError
from flash_moe_mlx.experts import ring_meeting

Addresses = list[tuple[str, int]]


def addresses_of(count: int, directory: Path) -> Addresses:
    hostfile = rank_environments(count, directory)[0]["MLX_HOSTFILE"]
    found = [hosts[0].split(":") for hosts in json.loads(Path(hostfile).read_text())]
    return [(host, int(port)) for host, port in found]


class Rank(threading.Thread):
    """A rank that meets the others on a thread of this process."""

    def __init__(self, rank: int, addresses: Addresses, seconds: float = 60.0):
        super().__init__(daemon=True)
        self.meeting = ring_meeting._Meeting(rank, addresses, seconds)
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            self.meeting.run()
        except DistributedError as error:
            self.error = str(error)
            self.meeting.close()

    def ended(self) -> str:
        self.join(30)
        assert not self.is_alive()
        return self.error


@contextmanager
def called_by_its_left(rank: int, addresses: Addresses) -> Iterator[socket.socket]:
    """Be a rank as far as to answer the one before it."""
    with socket.create_server(addresses[rank]) as listener:
        end, _ = listener.accept()
        with end:
            assert json.loads(end.recv(100)) == {"rank": rank - 1}
            end.sendall(json.dumps({"rank": rank}).encode() + b"\n")
            yield end


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_meet_and_leave_their_addresses_free(size: int, tmp_path: Path):
    addresses = addresses_of(size, tmp_path)
    ranks = [Rank(rank, addresses) for rank in reversed(range(size))]
    assert [rank.ended() for rank in ranks] == [""] * size
    assert all(rank.meeting._listener is None for rank in ranks)
    for address in addresses:  # as MLX binds them
        with socket.create_server(address):
            pass
    for rank in ranks:
        rank.meeting.close()


def test_one_that_dies_while_another_is_awaited_ends_all(tmp_path: Path):
    """Of four ranks, rank 2 dies; rank 3 hasn't come yet, and would be awaited for a minute."""
    addresses = addresses_of(4, tmp_path)
    first, second = Rank(0, addresses), Rank(1, addresses)
    with called_by_its_left(2, addresses):
        while "left" not in second.meeting._peers:
            time.sleep(0.01)
    for rank in (first, second):
        assert "all ranks must start together, got: rank 2 has died" in rank.ended()


def test_one_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ring_meeting, "_TELL_SECONDS", 0.2)
    addresses = addresses_of(3, tmp_path)
    ranks = [Rank(rank, addresses, seconds=0.5) for rank in (0, 1)]
    assert ["rank 2 has not started within 0.5 s" in rank.ended() for rank in ranks] == [True, True]


def test_other_programs_at_the_same_addresses_are_passed_over(tmp_path: Path):
    """A caller that says nothing, one that says something else, and a server in the next rank's place that does too."""
    addresses = addresses_of(2, tmp_path)
    with socket.create_server(addresses[1]) as other:
        first = Rank(0, addresses)
        end, _ = other.accept()
        end.close()
        end, _ = other.accept()  # it tries again
        end.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        end.close()
    for greeting in (b"", b"GET / HTTP/1.1\n"):
        with socket.create_connection(addresses[0]) as caller:
            caller.sendall(greeting)
    second = Rank(1, addresses)
    assert (first.ended(), second.ended()) == ("", "")
    first.meeting.close()
    second.meeting.close()


def test_an_address_that_is_taken_is_said(tmp_path: Path):
    addresses = addresses_of(2, tmp_path)
    with (
        socket.create_server(addresses[1]),
        pytest.raises(DistributedError, match=r"rank 1 of 2\] its address must be"),
    ):
        ring_meeting._Meeting(1, addresses, 1)


def test_processes_that_are_no_ranks_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLX_RANK", raising=False)
    for hosts in ("not there", "[]", '[["127.0.0.1:1"]]', '[["127.0.0.1"], [5]]', "{"):
        hostfile = tmp_path / "hosts.json"
        hostfile.write_text(hosts)
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / hosts) if hosts == "not there" else str(hostfile))
        for rank in ("", "0", "one"):
            monkeypatch.setenv("MLX_RANK", rank)
            with ring_meeting.meeting_on_ring(1) as has_met:
                assert not has_met

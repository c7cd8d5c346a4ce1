"""Ranks of a ring that meet before MLX connects them: together, or not at all and at once."""

import json
import socket
import threading
from pathlib import Path

import pytest
from benchmarks.ring import rank_environments

from flash_moe_mlx.errors import DistributedError
from flash_moe_mlx.experts import ring_meeting
from flash_moe_mlx.experts.ring_meeting import Addresses, Meeting, meet_on_ring


def addresses_of(count: int, directory: Path) -> Addresses:
    hostfile = rank_environments(count, directory)[0]["MLX_HOSTFILE"]
    found = [hosts[0].split(":") for hosts in json.loads(Path(hostfile).read_text())]
    return [(host, int(port)) for host, port in found]


class Rank(threading.Thread):
    """A rank that meets the others on a thread of this process."""

    def __init__(self, rank: int, addresses: Addresses, seconds: float = 60.0):
        super().__init__(daemon=True)
        self.meeting = Meeting(rank, addresses, seconds)
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            self.meeting.run()
        except DistributedError as error:
            self.error = str(error)

    def ended(self) -> str:
        self.join(50)
        assert not self.is_alive()
        return self.error


@pytest.mark.parametrize("size", [2, 4])
def test_all_meet_and_leave_their_addresses_free_and_callers_that_are_no_ranks_are_passed_over(
    size: int, tmp_path: Path
):
    addresses = addresses_of(size, tmp_path)
    first = Rank(0, addresses)
    silent = socket.create_connection(addresses[0])
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b'["rank", 77]\n', b"[]\n", b'{"rank": 1}\n', b"5\n"):
        with socket.create_connection(addresses[0]) as caller:
            caller.sendall(greeting)
    with socket.create_server(addresses[1]) as other:  # a program in the next rank's place
        for answer in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b'["rank", 77]\n'):
            end, _ = other.accept()
            end.sendall(answer)
            end.close()
    others = [Rank(rank, addresses) for rank in reversed(range(1, size))]
    assert [rank.ended() for rank in (first, *others)] == [""] * size
    silent.close()
    for address in addresses:  # as MLX binds them
        with socket.create_server(address):
            pass


def test_a_rank_that_dies_or_never_comes_ends_all_with_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of four ranks, rank 2 dies while rank 3 is awaited. Of three, the last never comes."""
    monkeypatch.setattr(ring_meeting, "_TELL_SECONDS", 0.5)
    addresses = addresses_of(4, tmp_path)
    with socket.create_server(addresses[2]) as listener:
        ranks = [Rank(rank, addresses) for rank in (0, 1)]
        end, _ = listener.accept()
        assert json.loads(end.recv(100)) == ["rank", 1]
        end.sendall(b'["rank", 2]\n')
        end.close()
    for rank in ranks:
        assert "all ranks must start together, got: rank 2 has died. Start all of them again" in rank.ended()

    addresses = addresses_of(3, tmp_path)
    for rank in [Rank(rank, addresses, seconds=0.5) for rank in (0, 1)]:
        assert "rank 2 has not started within 0.5 s" in rank.ended()
    with socket.create_server(addresses[1]), pytest.raises(DistributedError, match=r"rank 1 of 3\] its address must"):
        Meeting(1, addresses, 1)


def test_processes_that_are_no_ranks_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLX_RANK", raising=False)
    for hosts in ("not there", "[]", '[["127.0.0.1:1"]]', '[["127.0.0.1"], [5]]', "{"):
        hostfile = tmp_path / "hosts.json"
        hostfile.write_text(hosts)
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / hosts) if hosts == "not there" else str(hostfile))
        for rank in ("", "0", "one"):
            monkeypatch.setenv("MLX_RANK", rank)
            assert not meet_on_ring(1)

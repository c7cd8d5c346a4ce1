"""Side channel between ranks: an authenticated TCP connection from each to rank 0, set up through a collective."""

import contextlib
import json
import os
import secrets
import socket
import struct
import threading
import uuid
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import numpy as np

_WELCOME_WORDS = 1024


class RankLinks:
    """Connections of one rank: rank 0 has one to every other rank, the others have one to rank 0.

    Attributes:
        share_a_host: Whether at least two ranks run on the same host.
    """

    def __init__(self, rank: int, size: int, timeout: float, collective: Callable[[np.ndarray], np.ndarray]):
        """Connect. Collective: every rank makes its own at the same time.

        Args:
            rank: This process's number.
            size: Number of ranks.
            timeout: Seconds to wait for a message to leave; half of them to wait for the others' connections.
            collective: Sum of uint32 words over all ranks, which carries rank 0's address and key.

        Raises:
            ConnectionError: If the ranks can't reach each other; says why.
        """
        self._links: dict[int, Connection] = {}
        self._ranks: dict[int, int] = {}  # by file descriptor
        self._sending = threading.Lock()
        listener = None
        welcome: dict[str, Any] = {}
        if rank == 0:
            key = secrets.token_bytes(32)
            listener = Listener(("", 0), backlog=size, authkey=key)
            welcome = {"port": listener.address[1], "hosts": _own_addresses(), "key": key.hex()}  # type: ignore[index]
        words = np.zeros(_WELCOME_WORDS, np.uint32)
        text = json.dumps(welcome).encode() if welcome else b""
        words.view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
        welcome = json.loads(collective(words).tobytes().rstrip(b"\0"))
        host = f"{socket.gethostname()} {uuid.getnode()}"
        if listener is None:
            link = _call(welcome["hosts"], welcome["port"], bytes.fromhex(welcome["key"]))
            self._add(0, link, timeout)
            self.send({"rank": rank, "host": host})
            if not link.poll(timeout / 2):
                raise ConnectionError(f"got no answer of rank 0 within {timeout / 2:g} s")
            self.share_a_host = bool(self.receive(0)["share_a_host"])
        else:
            hosts = [host]
            accepting = threading.Thread(target=self._accept, args=(listener, size, timeout, hosts), daemon=True)
            accepting.start()
            accepting.join(timeout / 2)  # they have been started, and one that has died since must be missed in time
            if accepting.is_alive():
                raise ConnectionError(f"was called by {len(hosts) - 1} of {size - 1} ranks within {timeout / 2:g} s")
            self.share_a_host = len(set(hosts)) < size
            self.send({"share_a_host": self.share_a_host})

    @property
    def ranks(self) -> list[int]:
        """Ranks at the other ends."""
        return list(self._links)

    def send(self, message: dict[str, Any], but: int = -1) -> None:
        """Send a message to all ranks at the other ends, except ``but``; unreachable ones are passed over."""
        text = json.dumps(message).encode()
        for rank, link in self._links.items():
            if rank != but:
                with self._sending, contextlib.suppress(OSError):
                    link.send_bytes(text)

    def receive(self, rank: int) -> dict[str, Any]:
        """Return a rank's next message.

        Raises:
            OSError, EOFError: If the connection has ended.
        """
        message: dict[str, Any] = json.loads(self._links[rank].recv_bytes())
        return message

    def ready(self, timeout: float) -> list[int]:
        """Return ranks whose messages can be received, waiting for up to ``timeout`` seconds."""
        return [self._ranks[link.fileno()] for link in wait(list(self._links.values()), timeout)]  # type: ignore[union-attr]

    def drop(self, rank: int) -> None:
        """Forget a rank whose connection has ended."""
        with self._sending:
            link = self._links[rank]
            self._links = {other: end for other, end in self._links.items() if other != rank}
            del self._ranks[link.fileno()]
            link.close()

    def _add(self, rank: int, link: Connection, timeout: float) -> None:
        self._ranks[link.fileno()] = rank
        self._links = {**self._links, rank: link}
        # A rank that is frozen must not block the others once its buffer is full.
        with socket.socket(fileno=os.dup(link.fileno())) as end:
            seconds, rest = divmod(timeout, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), int(rest * 1e6)))
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _accept(self, listener: Listener, size: int, timeout: float, hosts: list[str]) -> None:
        while len(self._links) < size - 1:
            # Callers that don't know the key, and ranks that only look whether the port answers, are passed over.
            with contextlib.suppress(OSError, EOFError, ValueError, KeyError):
                link = listener.accept()
                hello = json.loads(link.recv_bytes())
                hosts.append(str(hello["host"]))
                self._add(int(hello["rank"]), link, timeout)
        listener.close()


def _call(hosts: list[str], port: int, key: bytes) -> Connection:
    for host in hosts:
        with contextlib.suppress(OSError, EOFError):
            socket.create_connection((host, port), timeout=1).close()
            return Client((host, port), authkey=key)
    raise ConnectionError(f"can't reach rank 0 at {', '.join(hosts)}, port {port}")


def _own_addresses() -> list[str]:
    """Return this machine's addresses, those that other machines may reach first."""
    found = []
    with contextlib.suppress(OSError):
        found = [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # no packet is sent: it only chooses the route's address
        found.append(str(probe.getsockname()[0]))
    return sorted({*found, "127.0.0.1"}, key=lambda address: (address.startswith("127."), address))

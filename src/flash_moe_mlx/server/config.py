"""ServerConfig: how a model is served."""

import re
from dataclasses import dataclass, field

from ..errors import RequestError
from .schema import Sampling

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ServerConfig:
    """How a model is served.

    Attributes:
        model_id: The name that clients ask for.
        api_key: What clients must send; None lets everybody in.
        max_queue: Requests that may wait besides the one that runs.
        max_body_bytes: Largest request body.
        prefix_cache: Size of the prefix cache, "auto", or None for none.
        allowed_hosts: Names that a request's Host header may say; None is any. A page of another site that has its
            name resolve to this machine is kept out by them.
        sampling: What requests that don't say otherwise are answered with.
    """

    model_id: str
    api_key: str | None = None
    max_queue: int = 16
    max_body_bytes: int = 4 << 20
    prefix_cache: int | str | None = "auto"
    allowed_hosts: tuple[str, ...] | None = LOOPBACK
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.model_id or not self.model_id.isprintable():
            raise RequestError(f"[model_id] must be printable text, got {self.model_id!r}. Choose a name with --name.")
        if self.api_key is not None and not (self.api_key.isprintable() and self.api_key == self.api_key.strip() != ""):
            # The key itself is not told: messages end up in logs.
            raise RequestError(
                "[api_key] must be printable text without spaces around it, got another. Choose another key."
            )
        for host in self.allowed_hosts or ():
            if not _HOST.fullmatch(host):
                raise RequestError(
                    f"[allowed_hosts] must be names or addresses without a port, got {host!r}. Write IPv6 in brackets."
                )

    @property
    def body_seconds(self) -> float:
        """Time within which a body must have come: 10 seconds, and what the largest takes at 100 kB/s."""
        return 10 + self.max_body_bytes / 100_000

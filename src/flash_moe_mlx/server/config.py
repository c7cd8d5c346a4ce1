"""ServerConfig: how a model is served."""

from dataclasses import dataclass, field

from .schema import Sampling

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServerConfig:
    """How a model is served.

    Attributes:
        model_id: The name that clients ask for.
        api_key: What clients must send; None lets everybody in.
        max_queue: Requests that may wait beside the one that runs.
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

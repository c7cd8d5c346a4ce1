"""ServerConfig: the server's settings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..chat.prompt import OWN_VARIABLES
from ..errors import RequestError
from .schema import Sampling

KV_BITS, KV_GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
"""Forms of a quantised KV cache that MLX has."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ServerConfig:
    """Settings of the server.

    Attributes:
        model_id: Name by which clients request the model.
        api_key: Key that clients must send; None admits everybody.
        max_queue: Maximum number of waiting requests, not counting the running ones.
        max_concurrent: Maximum number of requests to answer at once.
        max_body_bytes: Maximum size of a request body.
        prefix_cache: Size of the prefix cache, "auto", or None for none.
        prefix_directory: Directory in which prefix states and hot experts outlive the server; None keeps none.
        prefix_directory_bytes: Maximum total size of its files.
        template_arguments: Variables of the chat template for requests that don't set them.
        kv_bits: Bits of a quantised KV cache (lossy), which has no prefix cache; None keeps it as computed.
        kv_group_size: Group size of a quantised KV cache.
        quantized_kv_start: Tokens after which the KV cache is quantised.
        allowed_hosts: Names accepted in a request's Host header; None accepts any. They keep out pages of other sites
            whose name resolves to this machine.
        sampling: Defaults for requests that don't set sampling parameters.
    """

    model_id: str
    api_key: str | None = None
    max_queue: int = 16
    max_concurrent: int = 1
    max_body_bytes: int = 4 << 20
    prefix_cache: int | str | None = "auto"
    prefix_directory: str | None = None
    prefix_directory_bytes: int | str = "10GB"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    allowed_hosts: tuple[str, ...] | None = LOOPBACK
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.model_id or not self.model_id.isprintable():
            raise RequestError(f"[model_id] must be printable text, got {self.model_id!r}. Choose a name with --name.")
        if self.api_key is not None and not (self.api_key.isprintable() and self.api_key == self.api_key.strip() != ""):
            # The message must not contain the key, because messages end up in logs.
            raise RequestError(
                "[api_key] must be printable text without spaces around it, got another. Choose another key."
            )
        if self.max_concurrent < 1:
            raise RequestError(
                f"[max_concurrent] must be at least 1 request, got {self.max_concurrent}. Leave it out for 1."
            )
        if self.prefix_directory is not None and (self.prefix_cache is None or self.kv_bits is not None):
            raise RequestError(
                "[prefix_directory] must come with a prefix cache, got none. Leave out --prefix-cache 0 and --kv-bits."
            )
        self._check_template_arguments()
        if self.kv_bits is not None:
            self._check_kv_cache()
        for host in self.allowed_hosts or ():
            if not _HOST.fullmatch(host):
                raise RequestError(
                    f"[allowed_hosts] must be names or addresses without a port, got {host!r}. Write IPv6 in brackets."
                )

    def _check_template_arguments(self) -> None:
        given = self.template_arguments
        if not isinstance(given, Mapping) or set(given) & OWN_VARIABLES:
            got = sorted(set(given) & OWN_VARIABLES) if isinstance(given, Mapping) else f"a {type(given).__name__}"
            raise RequestError(
                f"[chat_template_args] must be an object without the server's own variables, got {got}. Try "
                '{"enable_thinking": false}.'
            )

    def _check_kv_cache(self) -> None:
        if self.kv_bits not in KV_BITS or self.kv_group_size not in KV_GROUP_SIZES or self.quantized_kv_start < 0:
            raise RequestError(
                f"[kv_bits] must be one of {KV_BITS}, in groups of {KV_GROUP_SIZES}, from a token on, got "
                f"{self.kv_bits}, {self.kv_group_size} and {self.quantized_kv_start}. Try 8, 64 and 5000."
            )
        if self.prefix_cache not in (None, "auto"):
            raise RequestError(
                f"[kv_bits] must come without a prefix cache, got {self.prefix_cache}. Leave out --prefix-cache."
            )

    @property
    def body_seconds(self) -> float:
        """Time within which a body must arrive: 10 seconds, plus the time of the largest body at 100 kB/s."""
        return 10 + self.max_body_bytes / 100_000

"""``flash-moe serve``."""

import errno
import logging
import os
import socket
from typing import Annotated

import typer

from ..errors import RequestError
from .logs import log_to_stderr
from .options import (
    ActivationBits,
    GpuMemoryLimit,
    Io,
    MaxContext,
    MemoryLimit,
    MinP,
    Model,
    NumExpertsPerTok,
    Revision,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    Verify,
    missing_extra,
    open_model,
)
from .printable import echo

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8080,
    name: Annotated[str | None, typer.Option(help="Name that clients ask for; the checkpoint's without it.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send as a bearer token.", envvar="FLASH_MOE_API_KEY")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that requests may come in under; may be repeated.")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait besides the one that runs.", min=0)] = 16,
    max_body: Annotated[str, typer.Option(help="Largest request body.")] = "4MB",
    prefix_cache: Annotated[
        str, typer.Option(help='Memory for states of earlier turns: auto, 0 for none, or a size such as "500MB".')
    ] = "auto",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    memory_limit: MemoryLimit = None,
    gpu_memory_limit: GpuMemoryLimit = None,
    max_context: MaxContext = 8192,
    io: Io = "auto",
    num_experts_per_tok: NumExpertsPerTok = None,
    revision: Revision = None,
    activation_bits: ActivationBits = None,
    verify: Verify = "sample",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model to OpenAI's clients, with a status page.

    Requests that don't set temperature, top_p, top_k or min_p get those given here. Without --api-key everybody who
    reaches the address may use the model.

    Examples:
        flash-moe serve
        flash-moe serve --model path/to/checkpoint --memory-limit 8GB --temperature 0.7 --top-p 0.8
        FLASH_MOE_API_KEY=secret flash-moe serve --host 0.0.0.0
    """
    try:
        import uvicorn

        from ..server.app import create_app
        from ..server.connection import BACKLOG, ConnectionLimits
    except ImportError as error:
        raise missing_extra(error.name or "starlette", "server") from error
    from ..config import parse_size
    from ..server.config import LOOPBACK, ServerConfig
    from ..server.schema import Sampling

    local = host in LOCAL_HOSTS
    # Taken before the model is loaded: a port that isn't free is told at once.
    with _listen(host, port) as listener:
        config = ServerConfig(
            model_id=name or ("demo" if model is None else _checkpoint_name(model)),
            api_key=api_key or None,
            max_queue=max_queue,
            max_body_bytes=parse_size(max_body),
            prefix_cache=None if prefix_cache == "0" else prefix_cache,
            allowed_hosts=(*LOOPBACK, *(allow_host or ())) if local or allow_host else None,
            sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p),
        )
        limits = memory_limit, gpu_memory_limit
        how = (*limits, max_context, io, num_experts_per_tok, revision, activation_bits, verify, trust_remote_code)
        with open_model(model, *how) as (loaded, tokenizer):
            app = create_app(loaded, tokenizer, config)
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            echo(f"Serving {config.model_id} at {address}/v1, status page at {address}/. Ctrl-C ends it.")
            if not local and api_key is None:
                echo("Everybody on the network may use it: set FLASH_MOE_API_KEY to a key.", err=True)
            log_to_stderr()  # failures are shown in any case
            logged = logging.getLogger("flash_moe_mlx").isEnabledFor(logging.INFO)
            settings = uvicorn.Config(
                app,
                log_config=None,
                log_level="info" if logged else "warning",
                access_log=logged,
                server_header=False,
                # Nothing is decided by what a proxy says of its clients.
                proxy_headers=False,
                http=ConnectionLimits(body_seconds=config.body_seconds + 10).protocol(),
                ws="none",
                backlog=BACKLOG,
                timeout_graceful_shutdown=2,
            )
            uvicorn.Server(settings).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Take the port.

    Raises:
        RequestError: If the address can't be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # the second: a name that can't be one
        number = getattr(error, "errno", None)
        what = getattr(error, "strerror", None) or str(error)
        advice = _LISTEN_ADVICE.get(number, "Choose an address of this machine with --host.")
        raise RequestError(f"[{host}:{port}] must be an address that is free, got {what}. {advice}") from error


_LISTEN_ADVICE: dict[int | None, str] = {
    errno.EADDRINUSE: "Choose another port with --port, or 0 for a free one, or end what listens there.",
    errno.EACCES: "Choose a port from 1024 with --port.",
    errno.EPERM: "Choose a port from 1024 with --port.",
}


def _checkpoint_name(model: str) -> str:
    """A directory's own name, or the repository's."""
    return os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model

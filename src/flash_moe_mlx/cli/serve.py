"""``flash-moe serve``."""

import errno
import json
import logging
import os
import socket
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from ..errors import RequestError
from ..installation import explain_import
from ..progress import report
from .logs import log_to_stderr
from .options import (
    STARTING,
    ActivationBits,
    AdapterPath,
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
    leads,
    missing_extra,
    open_model,
    sampling_of,
)
from .printable import echo

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_REACHED = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.", rich_help_panel="Access")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535, rich_help_panel="Access")
    ] = 8080,
    name: Annotated[
        str | None, typer.Option(help="Model name for clients. Default: the checkpoint's.", rich_help_panel="Access")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that clients must send as a bearer token.", envvar="FLASH_MOE_API_KEY", rich_help_panel="Access"
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Extra Host header to accept, such as behind a proxy; may be repeated.", rich_help_panel="Access"
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Maximum number of requests waiting in the queue.", min=0, rich_help_panel="Access")
    ] = 16,
    max_concurrent: Annotated[
        int,
        typer.Option(
            help="Maximum number of requests to answer at once, within memory.", min=1, rich_help_panel="Access"
        ),
    ] = 1,
    max_body: Annotated[str, typer.Option(help="Maximum size of a request body.", rich_help_panel="Access")] = "4MB",
    prefix_cache: Annotated[
        str,
        typer.Option(
            help='Memory for the prefix cache of earlier turns: auto, 0 (off) or a size like "500MB".',
            rich_help_panel="Caches",
        ),
    ] = "auto",
    prefix_dir: Annotated[
        str | None,
        typer.Option(
            help="Directory for long prompts' states and hot experts, which outlive the server. Holds prompts.",
            rich_help_panel="Caches",
        ),
    ] = None,
    prefix_dir_size: Annotated[
        str, typer.Option(help="Maximum total size of the files in --prefix-dir.", rich_help_panel="Caches")
    ] = "10GB",
    chat_template_args: Annotated[
        str, typer.Option(help="""Variables of the chat template, as JSON, such as '{"enable_thinking": false}'.""")
    ] = "{}",
    kv_bits: Annotated[
        int | None,
        typer.Option(
            help="Quantise the KV cache to 2 to 8 bits. Lossy; without a prefix cache.", rich_help_panel="Caches"
        ),
    ] = None,
    kv_group_size: Annotated[
        int, typer.Option(help="Group size of a quantised KV cache: 32, 64 or 128.", rich_help_panel="Caches")
    ] = 64,
    quantized_kv_start: Annotated[
        int, typer.Option(help="Tokens after which the KV cache is quantised.", min=0, rich_help_panel="Caches")
    ] = 5000,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    memory_limit: MemoryLimit = None,
    gpu_memory_limit: GpuMemoryLimit = None,
    max_context: MaxContext = 8192,
    io: Io = "auto",
    num_experts_per_tok: NumExpertsPerTok = None,
    revision: Revision = None,
    activation_bits: ActivationBits = None,
    verify: Verify = "sample",
    trust_remote_code: TrustRemoteCode = False,
    adapter_path: AdapterPath = None,
) -> None:
    """Serve a model over HTTP, through OpenAI-compatible APIs.

    Takes requests of OpenAI's and Anthropic's APIs, and shows a chat page at /chat and a status page at /. Sampling
    options are defaults for requests that don't set their own; without them, the model's own values apply. Without
    --api-key, anyone who can reach the address can use the model.

    Examples:
        flash-moe serve
        flash-moe serve --model path/to/checkpoint --memory-limit 8GB --temperature 0.7 --top-p 0.8
        FLASH_MOE_API_KEY=secret flash-moe serve --host 0.0.0.0
    """
    report(STARTING)
    try:
        import uvicorn

        from ..server.app import create_app
        from ..server.connection import BACKLOG, ConnectionLimits
    except ImportError as error:
        if explain_import(error):
            raise
        raise missing_extra(error.name or "starlette", "server") from error
    from ..config import parse_size
    from ..server.config import LOOPBACK, ServerConfig
    from ..server.schema import Sampling

    local = host in LOCAL_HOSTS
    # Bind before loading the model, so that a port in use is reported at once. Only rank 0 serves.
    with _listen(host, port) if leads() else nullcontext() as listener:
        config = ServerConfig(
            model_id=name or ("demo" if model is None else checkpoint_name(model)),
            api_key=api_key or None,
            max_queue=max_queue,
            max_concurrent=max_concurrent,
            max_body_bytes=parse_size(max_body, "max_body"),
            prefix_cache=None if prefix_cache == "0" else prefix_cache,
            prefix_directory=prefix_dir,
            prefix_directory_bytes=parse_size(prefix_dir_size, "prefix_dir_size"),
            template_arguments=_json_argument(chat_template_args),
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            allowed_hosts=(*LOOPBACK, *(allow_host or ())) if local or allow_host else None,
        )
        limits = memory_limit, gpu_memory_limit
        how = (*limits, max_context, io, num_experts_per_tok, revision, activation_bits, verify, trust_remote_code)
        with open_model(model, *how, adapter_path=adapter_path) as (loaded, tokenizer):
            assert listener is not None
            sampling = sampling_of(loaded.streaming.sampling, temperature, top_p, top_k, min_p)
            config = replace(config, sampling=Sampling(**asdict(sampling)))
            app = create_app(loaded, tokenizer, config)
            reached = _REACHED.get(host, host)  # where this machine's programs find it
            address = f"http://{f'[{reached}]' if ':' in reached else reached}:{listener.getsockname()[1]}"
            echo(f"Serving {config.model_id} at {address}/v1, chat page at {address}/chat. Ctrl-C ends it.")
            if host != reached and (own := _own_address()):
                echo(f"Other machines find it at http://{own}:{listener.getsockname()[1]}/v1.")
            echo(f"Sampling, where a request doesn't say: {sampling}.")
            if not local and api_key is None:
                echo("Everybody on the network may use it: set FLASH_MOE_API_KEY to a key.", err=True)
            log_to_stderr()  # failures are always shown
            logged = logging.getLogger("flash_moe_mlx").isEnabledFor(logging.INFO)
            settings = uvicorn.Config(
                app,
                log_config=None,
                log_level="info" if logged else "warning",
                access_log=logged,
                server_header=False,
                # Proxy headers about the client are ignored.
                proxy_headers=False,
                http=ConnectionLimits(body_seconds=config.body_seconds + 10).protocol(),
                ws="none",
                backlog=BACKLOG,
                timeout_graceful_shutdown=2,
            )
            server = uvicorn.Server(settings)

            def end() -> None:
                server.should_exit = True

            loaded.streaming.when_ranks_fail(end)
            server.run(sockets=[listener])
            loaded.streaming.check_ranks()


def _json_argument(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"[chat_template_args] must be JSON, got {error}. Try '{{\"enable_thinking\": false}}'."
        ) from error


def _own_address() -> str | None:
    """Return the address from which this machine reaches others, or None without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation; connecting a datagram socket sends nothing
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _listen(host: str, port: int) -> socket.socket:
    """Bind the port and listen on it.

    Raises:
        RequestError: If the address is in use or invalid.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        number = getattr(error, "errno", None)
        what = getattr(error, "strerror", None) or str(error)
        advice = _LISTEN_ADVICE.get(number, "Choose an address of this machine with --host.")
        if number == errno.EADDRINUSE:
            raise RequestError(
                f"[--port] {port} is in use on {host}. Use --port {port + 1}, or --port 0 for a free one."
            ) from error
        raise RequestError(f"[{host}:{port}] must be an address that is free, got {what}. {advice}") from error


_LISTEN_ADVICE: dict[int | None, str] = {
    errno.EACCES: "Choose a port from 1024 with --port.",
    errno.EPERM: "Choose a port from 1024 with --port.",
}


def checkpoint_name(model: str) -> str:
    """Return the directory's name, or the repository's."""
    return os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model

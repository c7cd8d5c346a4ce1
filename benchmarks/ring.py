"""Variables with which processes on this machine form a ring of mx.distributed, without mlx.launch."""

import json
import socket
from contextlib import ExitStack
from pathlib import Path


def rank_environments(count: int, directory: Path) -> list[dict[str, str]]:
    """Return the variables of each rank of a ring on free ports."""
    if count == 1:
        return [{}]
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    hostfile = directory / f"hosts-{hosts[0][0].rpartition(':')[2]}.json"
    hostfile.write_text(json.dumps(hosts))
    return [{"MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank)} for rank in range(count)]

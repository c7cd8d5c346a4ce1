"""Processes that share a model over MLX's ring on this machine, as `mlx.launch` starts them."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD = Path(__file__).parent / "rank_child.py"


@dataclass
class Ended:
    """How one rank ended: exit status, what its JSON document says, one entry a load, and the seconds it took."""

    status: int
    results: list[dict[str, Any]]
    stderr: str
    seconds: float


def rank_environments(count: int, directory: Path) -> list[dict[str, str]]:
    """The environment of each rank of a ring on free ports."""
    if count == 1:
        return [dict(os.environ)]
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    hostfile = directory / f"hosts-{hosts[0][0].rpartition(':')[2]}.json"
    hostfile.write_text(json.dumps(hosts))
    return [{**os.environ, "MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank)} for rank in range(count)]


def run_ranks(count: int, directory: Path, scratch: Path, what: dict[str, Any], timeout: float = 240) -> list[Ended]:
    """Run rank_child.py as each rank, and wait for all. One that doesn't end in time is killed, and the test fails."""
    command = [sys.executable, str(CHILD), str(directory), json.dumps({"loads": [{}], **what})]
    started = time.monotonic()
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for env in rank_environments(count, scratch)
    ]
    ended: list[Ended] = []
    try:
        for process in processes:
            left = max(timeout - (time.monotonic() - started), 0.1)
            out, err = process.communicate(timeout=left)
            results = json.loads(out) if out.strip() else []
            ended.append(Ended(process.returncode, results, err, time.monotonic() - started))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended

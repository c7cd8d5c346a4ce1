"""A server that speaks as much of the hub's HTTP as huggingface_hub asks for, and can be told to fail."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/model"


@dataclass
class Hub:
    """A running server.

    Attributes:
        endpoint: For HF_ENDPOINT.
        directory: What the repository holds.
        dropped: Files whose first whole download ends after half of its bytes, by a closed connection.
        shortened: Files to how many more downloads come with that many bytes too few, and a length to match.
        altered: Files to how many more downloads come with a flipped bit.
        downloads: (file, first byte) of each download begun.
        ranges: (file, first byte, last byte) of each part of a file that was asked for.
        cut: Ranges, first bytes, whose first download ends after half of its bytes, by a closed connection.
    """

    endpoint: str
    directory: Path
    dropped: set[str] = field(default_factory=set)
    shortened: dict[str, int] = field(default_factory=dict)
    altered: dict[str, int] = field(default_factory=dict)
    downloads: list[tuple[str, int]] = field(default_factory=list)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    cut: set[int] = field(default_factory=set)


@contextmanager
def serve(directory: Path) -> Iterator[Hub]:
    """Serve a checkpoint's directory as `REPOSITORY`."""
    hub = Hub("", directory)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if re.fullmatch(rf"/api/models/{REPOSITORY}(/revision/(main|{COMMIT}))?", path):
                self.send_json(describe(hub.directory))
            elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/(main|{COMMIT})/([\w.-]+)", path):
                self.send_file(hub.directory / match[2], body)
            else:
                self.send_error_json()

        def send_json(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def send_error_json(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_file(self, path: Path, body: bool) -> None:
            if not path.is_file():
                self.send_error_json()
                return
            data = path.read_bytes()
            first, last = 0, len(data) - 1
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(match[1]), min(int(match[2] or last), last)
            if body and match:
                hub.ranges.append((path.name, first, last))
            whole = body and last == len(data) - 1
            if whole:
                hub.downloads.append((path.name, first))
            if whole and hub.shortened.get(path.name, 0) > 0:
                hub.shortened[path.name] -= 1
                last -= 100
            if whole and hub.altered.get(path.name, 0) > 0:
                hub.altered[path.name] -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
            part = data[first : last + 1]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if not body:
                return
            if (whole and path.name in hub.dropped) or (match and first in hub.cut):
                hub.dropped.discard(path.name)
                hub.cut.discard(first)
                self.wfile.write(part[: len(part) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def describe(directory: Path) -> dict[str, Any]:
    """Return the reply of /api/models, with sizes and hashes."""
    siblings = []
    for path in sorted(directory.iterdir()):
        entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size}
        if path.suffix == ".safetensors":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": path.stat().st_size, "pointerSize": 135}
        siblings.append(entry)
    return {"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}

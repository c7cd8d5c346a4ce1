"""A hub that serves one directory, with or without ranges, and counts what it sends; as far as plan() asks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Attributes: directory; ranges, whether it knows the Range header; sent, bytes of each file that went out."""

    def __init__(self, directory: Path, ranges: bool):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory, self.ranges = directory, ranges
        self.sent: dict[str, int] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/name"):
            names = [str(p.relative_to(self.server.directory)) for p in self.server.directory.rglob("*") if p.is_file()]
            body = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        prefix = f"/owner/name/resolve/{COMMIT}/"
        file = self.server.directory / path.removeprefix(prefix)
        if not path.startswith(prefix) or not file.is_file():
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        data, name = file.read_bytes(), path.removeprefix(prefix)
        if not self.server.ranges or "Range" not in self.headers:
            return self._answer(200, data, {}, name)
        last = min(int(self.headers["Range"].partition("-")[2]), len(data) - 1)
        return self._answer(206, data[: last + 1], {"Content-Range": f"bytes 0-{last}/{len(data)}"}, name)

    def _answer(self, code: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        for start in range(0, len(body), 1 << 16):
            try:
                self.wfile.write(body[start : start + (1 << 16)])
            except ConnectionError:  # it has heard enough
                break
            self.server.sent[name] = self.server.sent.get(name, 0) + len(body[start : start + (1 << 16)])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_hub(directory: Path, *, ranges: bool = True) -> Iterator[Hub]:
    """Run a hub on this machine."""
    with Hub(directory, ranges) as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()

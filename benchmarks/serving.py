"""A server for several clients at once: ten minutes of mixed requests, and the silence while long prompts are read.

    python -m benchmarks.serving soak --seconds 600 --output serving.tsv
    python -m benchmarks.serving gaps --prompt 10000
    python -m benchmarks.serving gaps CHECKPOINT --prompt 10000 --memory-limit 3GB

Both start `flash-moe serve --max-concurrent`. `soak` asks from more clients than are answered at once, by a seed: every
route, streamed and whole, tools, schemas, tool results, streams left half-way, refused bodies. A row of the server's
figures is written every few seconds; statuses that a request must not get are errors. `gaps` sends one long prompt to
each streaming route and prints the longest time without a byte. Linux only.
"""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import httpx

COLUMNS = (
    "seconds answers left refused errors anonymous_bytes threads descriptors peak_bytes limit_bytes tokens longest_gap"
)
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sum"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Get the weather in a city.", "parameters": CITY}
FORMAT = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
ASKED = [
    "What is 17 + 25?",
    "Tell me a story about a small fox.",
    "What is the weather in Lisbon?",
    "What does Ana have?",
]
ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"]


@contextmanager
def serving(model: str | None, *options: str) -> Iterator[tuple[str, int]]:
    """Start a server; yields its address and process id."""
    command = [sys.executable, "-m", "flash_moe_mlx", "serve", "--port", "0", "--name", "any", "--max-concurrent", "4"]
    command += [*options, *(["--model", model] if model else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if "http" in line), "")
            found = re.search(r"http://[^/]+", line)
            if found is None:
                raise SystemExit("the server did not start")
            yield found[0], process.pid
        finally:
            process.terminate()


class Longest:
    """The longest time without a byte in any stream so far."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self, response: httpx.Response, chunks: int | None = None) -> bytes:
        """Read a stream, to its end or a number of chunks."""
        said, last = b"", time.monotonic()
        for chunk in itertools.islice(response.iter_raw(), chunks):
            now = time.monotonic()
            self.seconds, last = max(self.seconds, now - last), now
            said += chunk
        return said


def body(route: str, content: str, tokens: int, kind: str, stream: bool) -> dict[str, Any]:
    """Return a request of this kind: plain, schema, tools, or result (a tool's)."""
    fields: dict[str, Any] = {"model": "any", "stream": stream}
    fields["max_output_tokens" if route == "/v1/responses" else "max_tokens"] = tokens
    if route == "/v1/completions":
        return {"prompt": content, **fields, **({"response_format": FORMAT} if kind == "schema" else {})}
    asked: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if route == "/v1/responses":
        if kind == "schema":
            fields["text"] = {"format": {"type": "json_schema", "name": "sum", "schema": SCHEMA}}
        if kind in ("tools", "result"):
            fields["tools"] = [{"type": "function", **FUNCTION}]
        if kind == "result":
            call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Lisbon"}'}
            asked += [call, {"type": "function_call_output", "call_id": "c1", "output": "sunny"}]
        return {"input": asked, **fields}
    if route == "/v1/messages":
        if kind in ("tools", "result"):
            fields["tools"] = [{"name": "get_weather", "input_schema": CITY}]
        if kind == "result":
            use = {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Lisbon"}}
            result = {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}
            asked += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        return {"messages": asked, **fields}
    if kind == "schema":
        fields["response_format"] = FORMAT
    if kind in ("tools", "result"):
        fields["tools"] = [{"type": "function", "function": FUNCTION}]
    if kind == "result":
        function = {"name": "get_weather", "arguments": '{"city": "Lisbon"}'}
        call = {"id": "c1", "type": "function", "function": function}
        asked += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ]
    return {"messages": asked, **fields}


class Clients:
    """Clients that ask one server, and the counts of their answers."""

    def __init__(self, address: str, seconds: float):
        self._address = address
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.longest = Longest()

    def run(self, seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=self._address, timeout=600) as api:
            while time.monotonic() < self._end:
                outcome, error = "errors", ""
                try:
                    outcome, error = self._ask(api, draw)
                except httpx.HTTPError as raised:
                    error = repr(raised)
                with self._lock:
                    self.counts[outcome] += 1
                    if error:
                        self.errors[error[:300]] += 1

    def _ask(self, api: httpx.Client, draw: random.Random) -> tuple[str, str]:
        """Make one request. Returns the name of its outcome, and the error if it had to be another."""
        way = draw.choices(["answer", "leave", "refused", "count", "look"], [10, 3, 1, 1, 1])[0]
        if way == "look":
            return self._checked(api.get(draw.choice(["/v1/models", "/stats", "/metrics", "/chat", "/"])), 200)
        if way == "count":
            messages = [{"role": "user", "content": draw.choice(ASKED)}]
            return self._checked(
                api.post("/v1/messages/count_tokens", json={"model": "any", "messages": messages}), 200
            )
        if way == "refused":
            return self._checked(api.post(draw.choice(ROUTES), json={"model": "any", "max_tokens": "many"}), 400)
        route, stream = draw.choice(ROUTES), way == "leave" or draw.random() < 0.5
        kind = draw.choice(["plain", "plain", "schema", "tools", "result"])
        asked = body(route, draw.choice(ASKED), draw.randrange(1, 60), kind, stream)
        if not stream:
            return self._checked(api.post(route, json=asked), 200)
        with api.stream("POST", route, json=asked) as response:
            if response.status_code != 200:
                response.read()
                return self._checked(response, 200)
            if way == "leave":
                self.longest.read(response, draw.randrange(1, 6))
                return "left", ""
            said = self.longest.read(response)
        bad = b'"error"' in said and b"error" in said.split(b'"error"')[1][:200] and b'"error":null' not in said
        return ("errors", f"{route} {kind}: {said[-300:]!r}") if bad else ("answers", "")

    def _checked(self, response: httpx.Response, status: int) -> tuple[str, str]:
        if response.status_code != status:
            return "errors", f"{response.request.url.path}: {response.status_code} {response.text[:200]}"
        return ("answers" if status == 200 else "refused"), ""


def row(address: str, process: int, clients: Clients) -> list[Any]:
    """Return the figures of COLUMNS, but for the seconds."""
    figures = httpx.get(f"{address}/stats", timeout=60).json()
    status = Path(f"/proc/{process}/status").read_text()
    anonymous = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    counts = clients.counts
    return [
        *(counts[name] for name in ("answers", "left", "refused", "errors")), anonymous,
        len(os.listdir(f"/proc/{process}/task")), len(os.listdir(f"/proc/{process}/fd")),
        int(figures["peak_memory_bytes"]), int(figures["memory_limit_bytes"]), int(figures["generated_tokens_total"]),
        round(clients.longest.seconds, 2),
    ]  # fmt: skip


def soak(arguments: argparse.Namespace, file: TextIO) -> Counter[str]:
    """Ask from all clients at once and write rows; returns the errors."""
    limits = ["--memory-limit", arguments.memory_limit or "22MB", "--max-context", "256", "--prefix-cache", "1MB"]
    with serving(arguments.model, *limits) as (address, process):
        clients = Clients(address, arguments.seconds)
        with ThreadPoolExecutor(arguments.clients) as pool:
            started = time.monotonic()
            futures = [pool.submit(clients.run, arguments.seed + number) for number in range(arguments.clients)]
            print(*COLUMNS.split(), sep="\t", file=file, flush=True)
            while not all(future.done() for future in futures):
                time.sleep(arguments.every)
                now = round(time.monotonic() - started, 1)
                print(now, *row(address, process, clients), sep="\t", file=file, flush=True)
            for future in futures:
                future.result()
    return clients.errors


def gaps(arguments: argparse.Namespace) -> None:
    """Send one long prompt to each streaming route, one after the other, and print what the client saw."""
    limits = ["--max-context", str(arguments.prompt + 2048), "--prefix-cache", "0"]
    limits += ["--memory-limit", arguments.memory_limit] if arguments.memory_limit else []
    with serving(arguments.model, *limits) as (address, _), httpx.Client(base_url=address, timeout=600) as api:
        words = "What is the weather in Lisbon? "
        counted = {"model": "any", "messages": [{"role": "user", "content": words * 100}]}
        tokens = api.post("/v1/messages/count_tokens", json=counted).json()["input_tokens"]
        print("route\tprompt_tokens\tseconds\tbytes\tlongest_gap")
        for route in ROUTES:
            content = words * round(100 * arguments.prompt / tokens)
            before = api.get("/stats").json()["prompt_tokens_total"]
            started, longest = time.monotonic(), Longest()
            with api.stream("POST", route, json=body(route, content, 16, "plain", True)) as response:
                said = longest.read(response)
            seconds = time.monotonic() - started
            read = api.get("/stats").json()["prompt_tokens_total"] - before
            print(f"{route}\t{read:.0f}\t{seconds:.1f}\t{len(said)}\t{longest.seconds:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["soak", "gaps"])
    parser.add_argument("model", nargs="?", help="the embedded model by default")
    parser.add_argument("--memory-limit")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=10_000, help="tokens of the long prompts")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "gaps":
        gaps(arguments)
        return
    with arguments.output.open("w") if arguments.output else os.fdopen(os.dup(sys.stdout.fileno()), "w") as file:
        errors = soak(arguments, file)
    for error, count in errors.items():
        print(count, json.dumps(error))
    raise SystemExit(bool(errors))


if __name__ == "__main__":
    main()

"""`flash-moe serve` as a process: what it prints, what docs/server.md says of it, how it ends."""

import ipaddress
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flash_moe_mlx.cli import options as module
from flash_moe_mlx.cli import serve

from ..support.command_line import refusal
from .test_main import spawn

pytestmark = pytest.mark.xdist_group("serve")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "server.md").read_text()
DOCUMENTED = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def recommending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo with sampling that its authors recommend; the likeliest token is still the only choice."""
    directory = tmp_path_factory.mktemp("checkpoint") / "demo"
    shutil.copytree(module.model_path(None), directory)
    recommended = {"do_sample": True, "temperature": 0.6, "top_k": 1}
    (directory / "generation_config.json").write_text(json.dumps(recommended))
    return directory


@pytest.fixture(scope="module")
def address(recommending: Path) -> Iterator[str]:
    process = spawn("serve", "--model", str(recommending), "--port", "0", "--max-context", "512", text=True)
    try:
        line = process.stdout.readline()
        match = re.match(r"Serving demo at (http://127\.0\.0\.1:\d+)/v1, chat page at \1/chat\. Ctrl-C ends it\.", line)
        assert match, line + process.stderr.read()
        assert process.stdout.readline() == "Sampling, where a request doesn't say: temperature 0.6, top-k 1.\n"
        yield match[1]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (130, "")
        assert re.fullmatch(r"(Sampling, where a request doesn't say: .*\n)?", rest)
    finally:
        process.kill()
        process.communicate()


def test_the_networks_address_is_this_machines_own():
    own = serve._own_address()
    assert own is None or (ipaddress.ip_address(own).version == 4 and not ipaddress.ip_address(own).is_unspecified)


def test_the_checkpoints_sampling_is_named(address: str):
    (described,) = httpx.get(f"{address}/v1/models").json()["data"]
    assert described["default_sampling"] == {"temperature": 0.6, "top_p": 1.0, "top_k": 1, "min_p": 0.0}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_python_example(address: str):
    (code,) = blocks("python")
    assert DOCUMENTED in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace(DOCUMENTED, address)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "42" in done.stdout


def test_the_curl_example(address: str):
    (command,) = [block for block in blocks("sh") if block.startswith("curl")]
    assert DOCUMENTED in command
    done = subprocess.run(
        ["sh", "-c", "curl() { command curl -sS \"$@\"; }\n" + command.replace(DOCUMENTED, address)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].count("42") == 1


def test_the_documented_routes_exist(address: str):
    routes = re.findall(r"`(?:GET|POST) ([^`]+)`", PAGE)
    assert len(routes) == 11
    for route in routes:
        assert httpx.get(address + route).status_code in (200, 405)  # 405: it is for POST


def test_a_port_that_is_taken_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refusal("serve", "--port", str(taken.getsockname()[1]))
    assert "in use" in line and "--port" in line and "Check the path" not in line


def test_other_addresses_that_cant_be_had_are_told_with_advice():
    for host in ("192.0.2.1", "no.such.host.invalid", "::2"):
        line = refusal("serve", "--host", host, "--port", "0")
        assert "--host" in line and "Check the path" not in line


def test_sizes_that_are_none_are_told_in_one_line():
    assert "much" in refusal("serve", "--port", "0", "--max-body", "much")
    assert "GB" in refusal("serve", "--port", "0", "--prefix-cache", "900GB", "--memory-limit", "1GB")


def test_options_that_can_not_be_used_are_told_in_one_line():
    assert "must be JSON" in refusal("serve", "--port", "0", "--chat-template-args", "{")
    assert "must be an object" in refusal("serve", "--port", "0", "--chat-template-args", "[]")
    assert "must be one of" in refusal("serve", "--port", "0", "--kv-bits", "7")
    assert "much" in refusal("serve", "--port", "0", "--prefix-dir-size", "much")

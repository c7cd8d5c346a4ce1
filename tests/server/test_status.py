"""The figures: Prometheus' text, the JSON behind the status page, and the page's own script."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import httpx
import openai
import pytest

from ..support.serving import SUM, TIGHT, client, demo, post, stats

pytestmark = pytest.mark.xdist_group("server_status")

KEY = "a key ✓"
BEARER = {"Authorization": f"Bearer {KEY}".encode()}
LINE = re.compile(r'flash_moe_[a-z_]+(\{[a-z]+="[^"\\\n]*"(,[a-z]+="[^"\\\n]*")*\})? -?[0-9.e+-]+')


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with demo(**TIGHT) as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with demo(api_key=KEY, max_queue=0) as running:
        yield running


def ask(address: str) -> dict[str, Any]:
    """The usage."""
    return post(address, body={"messages": SUM}).json()["usage"]


def test_metrics_are_prometheus_text(address: str):
    ask(address)
    answer = httpx.get(f"{address}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.endswith("\n")
    typed: dict[str, str] = {}
    for line in answer.text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name not in typed
            typed[name] = kind
        elif not line.startswith("# HELP"):
            assert LINE.fullmatch(line), line
            name = re.match(r"\w+", line)[0]
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name in typed or typed[base] == "histogram"
            if typed.get(name) == "counter":
                assert name.endswith("_total")
    assert {"gauge", "counter", "histogram"} == set(typed.values())
    buckets = [int(n) for n in re.findall(r"time_to_first_token_seconds_bucket\{.*\} (\d+)", answer.text)]
    assert buckets == sorted(buckets) and buckets[-1] >= 1
    assert 'flash_moe_requests_total{path="/v1/chat/completions",status="200"} ' in answer.text


def test_counters_count(address: str):
    ask(address)
    before = stats(address)
    usage = ask(address)
    tokens, prompt = usage["completion_tokens"], usage["prompt_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    httpx.get(f"{address}/nowhere")
    after = stats(address)
    grown = {name: after[name] - before[name] for name in before if name.endswith("_total")}
    assert grown["generated_tokens_total"] == tokens and grown["answers_total"] == 1
    assert grown["prompt_tokens_total"] == prompt
    assert grown["cached_prompt_tokens_total"] == cached > prompt / 2  # it was asked before
    assert grown["generation_seconds_total"] > 0 and after["tokens_per_second"] > 0
    # In each of 8 layers, at most 4 experts per token, in a pass or two for the prompt; the end token is not fed back.
    asked = grown["expert_hits_total"] + grown["expert_misses_total"]
    assert 8 * tokens * 4 <= asked <= 8 * (prompt - cached + tokens - 1) * 4
    assert grown["expert_misses_total"] > 0 and grown["expert_read_bytes_total"] > 0
    assert 0 < after["expert_hit_rate"] < 1
    assert after["peak_memory_bytes"] <= after["memory_limit_bytes"] == 22_000_000
    assert "/nowhere" not in httpx.get(f"{address}/metrics").text


def test_health(address: str):
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_without_the_key_401(guarded: str):
    for path in ("/v1/models", "/metrics", "/stats", "/nowhere"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {'x' * 9}"}):
            answer = httpx.get(f"{guarded}{path}", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert post(guarded, body={"messages": SUM}).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        client(guarded, "wrong").models.list()
    assert httpx.get(f"{guarded}/stats", headers=BEARER).status_code == 200
    assert httpx.get(f"{guarded}/health").status_code == 200
    page = httpx.get(f"{guarded}/")
    assert page.status_code == 200 and KEY not in page.text


def test_without_a_queue_one_after_the_other_is_answered(guarded: str):
    for _ in range(20):
        assert post(guarded, body={"messages": SUM, "max_tokens": 1}, headers=BEARER).status_code == 200


def run_script(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the page's script on two answers of /stats, one second apart."""
    page = files("flash_moe_mlx").joinpath("server", "status.html").read_text()
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    ask = (
        f"const [a, b] = {json.dumps(figures)}; console.log(JSON.stringify([rates(a, b, 1), rows(b), rates(b, b, 0)]))"
    )
    done = subprocess.run(["node", "-"], input=script + ask, capture_output=True, text=True, check=True)
    rates, rows, still = json.loads(done.stdout)
    return {"rates": rates, "rows": dict(rows), "still": still}


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_the_pages_script_reads_what_the_server_says(address: str):
    ask(address)
    before = stats(address)
    ask(address)
    after = stats(address)
    shown = run_script([before, after])
    tokens = after["generated_tokens_total"] - before["generated_tokens_total"] - 1
    seconds = after["generation_seconds_total"] - before["generation_seconds_total"]
    assert shown["rates"]["speed"] == pytest.approx(tokens / seconds)
    assert 0 < shown["rates"]["hits"] < 1
    assert 0 < shown["rates"]["wait"] < 1
    assert shown["rates"]["read"] == after["expert_read_bytes_total"] - before["expert_read_bytes_total"]
    assert shown["still"] == {"speed": None, "hits": None, "wait": None, "read": 0}
    assert shown["rows"]["Requests"] == "0 running, 0 waiting"
    assert "limit 22.0 MB" in shown["rows"]["Memory"]
    assert not [value for value in shown["rows"].values() if "NaN" in value or "undefined" in value]

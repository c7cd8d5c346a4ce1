"""``flash-moe generate`` on the embedded model."""

import re
import sys

import pytest

from ..support.command_line import document, invoke, refusal, succeed

ADD = "What is 17 + 25?"


def test_prompt_from_the_command_line_and_from_standard_input():
    answer = succeed("generate", ADD)
    assert "42" in answer and answer.endswith("\n")
    assert succeed("generate", stdin=f"{ADD}\n") == answer
    assert succeed("generate", "-p", ADD) == answer
    assert succeed("generate", "--prompt", "-", "-n", "256", stdin=f"{ADD}\n") == answer  # as mlx-lm and llama.cpp
    assert succeed("generate", "--system", "Speak of foxes only.", ADD) != ""


def test_json_has_usage_and_streaming_figures():
    result = document("generate", ADD, "--json", "--memory-limit", "14MB", "--max-context", "128")
    assert "42" in result["text"]
    usage, streaming, memory = result["usage"], result["streaming"], result["memory"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < streaming["hit_rate"] < 1 and streaming["bytes_read"] > 0
    assert streaming["hit_rate"] == streaming["hits"] / (streaming["hits"] + streaming["misses"])
    assert memory["limit_bytes"] == 14_000_000 and memory["peak_bytes"] > 0
    assert (result["finish_reason"], result["lossy"]) == ("stop", [])
    cut = document("generate", ADD, "--json", "--max-tokens", "2", "--num-experts-per-tok", "2")
    assert (cut["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 2)
    assert cut["lossy"]
    rounded = document("generate", ADD, "--json", "--max-tokens", "2", "--activation-bits", "8", "--verify", "none")
    assert rounded["lossy"] == ["8-bit activations in decode"]
    assert "sample" in refusal("generate", ADD, "--verify", "all")


def test_figures_are_printed_beside_the_answer():
    plain, told = (invoke("generate", ADD, "--max-tokens", "3", *more) for more in ((), ("--stats",)))
    assert (plain.stdout, plain.stderr) == (told.stdout, ""), "none where nobody looks"
    assert re.fullmatch(r"\d+ prompt tokens, .* tok/s; 3 tokens, .* tok/s; hit rate \d+%, .* read\n", told.stderr)


def test_sampling_is_repeatable_with_a_seed():
    def story(seed: int) -> str:
        options = ("--temperature", "3", "--top-k", "50", "--max-tokens", "12", "--seed", str(seed))
        return succeed("generate", "Tell me a story about a small fox.", *options)

    first = story(1)
    assert story(1) == first != story(2)


def test_raw_goes_on_with_the_text():
    raw = document("generate", "--raw", "--json", "--max-tokens", "4", "Once upon a time")
    chat = document("generate", "--json", "--max-tokens", "4", "Once upon a time")
    assert raw["usage"]["prompt_tokens"] < chat["usage"]["prompt_tokens"]


def test_a_prompt_must_be_given(monkeypatch: pytest.MonkeyPatch):
    assert "at least one token" in refusal("generate", "--raw", "")
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    assert "[prompt] must be given" in refusal("generate")
    assert sys.stdin is not None

"""What the server is started with: variables of the chat template, and a quantised KV cache."""

from importlib.resources import files
from typing import Any

import pytest

import flash_moe_mlx
from flash_moe_mlx import RequestError, chat_prompt, generate
from flash_moe_mlx.server.config import ServerConfig

from ..support.serving import STORY, client, served

pytestmark = pytest.mark.xdist_group("server")


@pytest.mark.parametrize("start", [0, 40])
def test_a_quantised_kv_cache_answers_as_generate_does(start: int):
    how: dict[str, Any] = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": start}
    model, tokenizer = flash_moe_mlx.load(files("flash_moe_mlx") / "demo", max_context=512)
    with model.streaming, served(model, tokenizer, **how) as address:
        answer = client(address).chat.completions.create(model="demo", messages=STORY, max_tokens=40)
        tokens, _ = chat_prompt(tokenizer, STORY)
        quantised = generate(model, tokenizer, tokens, max_tokens=40, **how)
        assert answer.choices[0].message.content == quantised
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"kv_bits": 7}, "must be one of"),
        ({"kv_bits": 8, "kv_group_size": 48}, "must be one of"),
        ({"kv_bits": 8, "quantized_kv_start": -1}, "must be one of"),
        ({"kv_bits": 8, "prefix_cache": "1GB"}, "without a prefix cache"),
        ({"kv_bits": 8, "prefix_directory": "x"}, "must come with a prefix cache"),
        ({"template_arguments": {"tools": []}}, "without the server's own variables"),
        ({"template_arguments": [1]}, "must be an object without"),
    ],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any], said: str):
    with pytest.raises(RequestError, match=said):
        ServerConfig("demo", **how)


def test_requests_keep_the_last_word_about_the_template(monkeypatch: pytest.MonkeyPatch):
    from flash_moe_mlx.server import worker

    seen: list[dict[str, Any]] = []
    make = worker.chat_prompt

    def noted(tokenizer: Any, messages: Any, **arguments: Any) -> Any:
        seen.append(arguments)
        return make(tokenizer, messages, **arguments)

    monkeypatch.setattr(worker, "chat_prompt", noted)
    model, tokenizer = flash_moe_mlx.load(files("flash_moe_mlx") / "demo", max_context=512)
    defaults = {"enable_thinking": False, "reasoning_effort": "low"}
    with model.streaming, served(model, tokenizer, template_arguments=defaults) as address:
        for extra in ({}, {"chat_template_kwargs": {"reasoning_effort": "high"}}):
            client(address).chat.completions.create(model="demo", messages=STORY, max_tokens=2, extra_body=extra)
    assert [(a["enable_thinking"], a["reasoning_effort"]) for a in seen] == [(False, "low"), (False, "high")]

"""A server's prefix directory: a long prompt is read once, whatever the server is restarted for."""

from pathlib import Path

import pytest

from flash_moe_mlx import RequestError
from flash_moe_mlx.server.config import ServerConfig

from ..support.serving import client, demo

pytestmark = pytest.mark.xdist_group("server")

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " + "The fox lives in the forest. " * 110}


def test_a_system_prompt_is_read_once_in_two_servers_lives(tmp_path: Path):
    answers, cached = [], []
    for _ in range(2):
        with demo(max_context=2048, prefix_directory=str(tmp_path)) as address:
            answer = client(address).chat.completions.create(
                model="demo",
                messages=[SYSTEM, {"role": "user", "content": "Who lives there?"}],
                max_tokens=12,
                logprobs=True,
            )
        answers.append([(token.token, token.logprob) for token in answer.choices[0].logprobs.content])
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert answers[0] == answers[1]
    assert cached[0] == 0 and cached[1] > 500
    assert list(tmp_path.glob("experts-*.json"))


def test_a_directory_without_a_prefix_cache_is_refused():
    with pytest.raises(RequestError, match="must come with a prefix cache"):
        ServerConfig("demo", prefix_cache=None, prefix_directory="somewhere")

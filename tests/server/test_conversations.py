"""Several clients at once, and long conversations."""

import threading
import time
from collections.abc import Iterator

import pytest

from ..support import concurrent_clients
from ..support.serving import TIGHT, client, demo, stats, wait_until

pytestmark = pytest.mark.serial

SECONDS = 10


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with demo(max_context=2048) as running:
        yield running


def test_eight_clients_get_what_one_gets():
    """Two minutes of it: python -m tests.support.concurrent_clients 120."""
    with demo(**TIGHT) as tight:
        outcome = concurrent_clients.run(tight, SECONDS)
    assert outcome.errors == {}
    assert outcome.different == []
    assert outcome.answers >= 2 * len(concurrent_clients.CONVERSATIONS)


def test_the_second_turn_of_a_long_conversation_is_answered_soon(address: str):
    """A long prompt, an answer, and another question: a fifth of the time to the first token, at most."""
    api = client(address)

    def ask(messages: list) -> tuple[float, str, int, int]:
        """Seconds to the first token, the answer, tokens of the prompt, and how many of them were cached."""
        started = time.perf_counter()
        stream = api.chat.completions.create(
            model="demo", messages=messages, stream=True, max_tokens=16, stream_options={"include_usage": True}
        )
        first, text, usage = None, "", None
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - started
                text += chunk.choices[0].delta.content
            usage = chunk.usage
        return first, text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens

    ask([{"role": "user", "content": "Hello"}])  # kernels are compiled
    firsts, seconds = [], []
    for name in ("Ana", "Bob", "Eva"):
        facts = " ".join(f"{name} has {n} boats and a blue kite." for n in range(2, 90))
        messages = [{"role": "system", "content": facts}, {"role": "user", "content": "What is 17 + 25?"}]
        first, answer, tokens, cached = ask(messages)
        assert tokens >= 1000 and cached == 0
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "What is 3 + 4?"}]
        second, _, longer, cached = ask(messages)
        assert longer > tokens and longer - cached < 40
        print(f"{tokens} tokens: {first * 1e3:.0f} ms; {longer} tokens, {cached} cached: {second * 1e3:.0f} ms")
        firsts.append(first)
        seconds.append(second)
    assert min(seconds) <= min(firsts) / 5


def test_the_queue_is_served_in_turn(address: str):
    """A request that waits behind a long answer is answered after it, and the server says meanwhile that it waits."""
    api = client(address)
    ended: list[str] = []

    def ask(name: str, tokens: int) -> None:
        api.completions.create(model="demo", prompt="Once there was", max_tokens=tokens, logit_bias={"2": -100})
        ended.append(name)

    threads = [threading.Thread(target=ask, args=args) for args in (("first", 200), ("second", 1))]
    threads[0].start()
    wait_until(lambda: stats(address)["running_requests"])
    threads[1].start()
    wait_until(lambda: stats(address)["queued_requests"] or ended)
    assert ended == [], "the second has not waited"
    for thread in threads:
        thread.join(60)
    assert ended == ["first", "second"]

"""Clients that ask one server at once for some time, each answer compared with that of a client alone.

python -m tests.support.concurrent_clients 120
"""

import itertools
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import openai

from .serving import STORY, SUM, TIGHT, WEATHER, WEATHER_TOOL, client, demo, stats

CLIENTS = 8
FACTS = {"role": "system", "content": "Ana has a red boat. Bob has a blue kite. Eva has a green coat."}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": SUM},
    {"messages": STORY, "max_tokens": 40},
    {"messages": WEATHER, "tools": [WEATHER_TOOL]},
    {"messages": [FACTS, {"role": "user", "content": "What does Ana have?"}]},
    {"messages": [FACTS, {"role": "user", "content": "What does Bob have?"}]},
    {"messages": [FACTS, *SUM, {"role": "assistant", "content": "17 plus 25 is 42."}, *STORY], "max_tokens": 20},
    {"messages": [{"role": "user", "content": "What is 38 + 54?"}], "stop": ["is"]},
    {"messages": [{"role": "user", "content": "Tell me a story about a small cat."}], "max_tokens": 30},
]
Answer = tuple[Any, ...]


def ask(api: openai.OpenAI, conversation: dict[str, Any], stream: bool) -> Answer:
    """The answer's tokens, its tool calls, and why it ended."""
    options = {"model": "demo", "temperature": 0, "logprobs": True, **conversation}
    if not stream:
        answer = api.chat.completions.create(**options)
        (choice,), usage = answer.choices, answer.usage
        logprobs = choice.logprobs.content
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        return (
            [t.token for t in logprobs],
            calls,
            choice.message.content or "",
            choice.finish_reason,
            usage.completion_tokens,
        )
    tokens, calls, text, reason, usage = [], [], "", None, None
    for chunk in api.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            tokens += [t.token for t in choice.logprobs.content] if choice.logprobs else []
            for piece in choice.delta.tool_calls or []:
                if piece.index == len(calls):
                    calls.append((piece.function.name, ""))
                name, arguments = calls[piece.index]
                calls[piece.index] = name, arguments + piece.function.arguments
            text += choice.delta.content or ""
            reason = choice.finish_reason
    return tokens, calls, text, reason, usage.completion_tokens


@dataclass
class Outcome:
    """Observations of the clients."""

    answers: int = 0
    tokens: int = 0
    different: list[tuple[dict[str, Any], Answer, Answer]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def run(address: str, seconds: float, clients: int = CLIENTS) -> Outcome:
    """Ask from so many clients for so long, streams and whole answers in turn."""
    api = client(address)
    alone = [ask(api, conversation, stream=False) for conversation in CONVERSATIONS]
    outcome, lock, end = Outcome(), threading.Lock(), time.monotonic() + seconds

    def work(number: int) -> None:
        own = client(address)
        for i in itertools.count(number):
            if time.monotonic() > end:
                return
            which = i % len(CONVERSATIONS)
            try:
                answer = ask(own, CONVERSATIONS[which], stream=i // len(CONVERSATIONS) % 2 == number % 2)
            except openai.OpenAIError as error:
                with lock:
                    outcome.errors[repr(error)] += 1
                continue
            with lock:
                outcome.answers += 1
                outcome.tokens += answer[-1]
                if answer != alone[which]:
                    outcome.different.append((CONVERSATIONS[which], answer, alone[which]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def main() -> None:
    seconds = float(sys.argv[1])
    with demo(**TIGHT) as address:
        started = time.monotonic()
        outcome = run(address, seconds)
        took = time.monotonic() - started
        hit_rate = stats(address)["expert_hit_rate"]
    print(
        f"{CLIENTS} clients, {took:.0f} s, hit rate {hit_rate:.1%}: {outcome.answers} answers, {outcome.tokens} tokens"
    )
    print(f"{len(outcome.different)} differ from a single client's, {sum(outcome.errors.values())} errors")
    for different in outcome.different[:3]:
        print(different)
    print(*outcome.errors.items(), sep="\n")
    sys.exit(bool(outcome.different or outcome.errors))


if __name__ == "__main__":
    main()

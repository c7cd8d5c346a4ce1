"""The demo model's data: conversations made by program from a seed, split into train and held-out.

Whether an exchange is held out follows from a hash of its own text (of the pair of numbers, for sums in digits), not
from the seed: no held-out prompt is ever trained on, whatever the seeds. System prompts do not count: they are noise.

    python data.py --split held-out --seed 7 --count 5      # print five conversations as the model sees them
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import toolcalls
import world
from arithmetic import arithmetic
from facts import facts
from sample import Message, Part, Tool, ask
from tasks import copying, knowledge, story, talk, unknown

HERE = Path(__file__).parent
END = "<|im_end|>"
HELD_OUT_ONE_IN = 32
CATEGORIES = 12
# Share of each kind of conversation. Texts are short, so that tool calls are still most of the tokens.
MIX: dict[str, float] = {"tools": 0.42, "texts": 0.565, "pinned": 0.015}
TEXTS: dict[Callable[[Random], Part], float] = {
    arithmetic: 0.30, facts: 0.28, story: 0.10, knowledge: 0.15, talk: 0.06, copying: 0.04, unknown: 0.07,
}  # fmt: skip


@dataclass
class Conversation:
    """A training or test example.

    Attributes:
        category: Category of the last exchange, with "raw_" before it if there is no chat template.
        messages: Chat messages; the last one is the answer to learn or to test.
        tools: Function schemas in the prompt.
        raw: The model sees the bare question, as ``generate(model, tokenizer, "...")`` passes it.
        held_out: Whether any exchange in it belongs to the held-out set, and whether the last does.
    """

    category: str
    messages: list[Message]
    tools: list[Tool]
    raw: bool
    held_out: tuple[bool, bool]

    @property
    def answer(self) -> str:
        """The expected answer, without the end token."""
        message = self.messages[-1]
        if not message.get("tool_calls"):
            return str(message["content"])
        function = message["tool_calls"][0]["function"]
        call = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
        return f"<tool_call>\n{call}\n</tool_call>"

    def prompt(self, tokenizer) -> str:
        """Return the text before the answer, by the tokenizer's own chat template."""
        if self.raw:
            return str(self.messages[0]["content"])
        return tokenizer.apply_chat_template(
            self.messages[:-1], tools=self.tools or None, add_generation_prompt=True, tokenize=False
        )

    def text(self, tokenizer) -> str:
        """Return the whole training text."""
        if self.raw:
            return f"{self.messages[0]['content']}{self.answer}{END}\n"
        return tokenizer.apply_chat_template(self.messages, tools=self.tools or None, tokenize=False)


def _keys(part: Part) -> Iterator[str]:
    if part.key:
        yield part.key
        return
    names = [tool["function"]["name"] for tool in part.tools]
    for i, message in enumerate(part.messages):
        if message["role"] == "assistant":
            yield json.dumps([names, part.context, part.messages[:i]], ensure_ascii=False)


def is_held_out(key: str) -> bool:
    """Return whether the exchange with this key is in the held-out set."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return key != "pinned" and int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _choose(r: Random, shares: dict) -> object:
    return r.choices(list(shares), weights=list(shares.values()))[0]


def text_part(r: Random, *, in_tools: bool = False) -> Part:
    """Generate a question that needs no tool. Pinned prompts always keep the same key."""
    part = _choose(r, TEXTS)(r)  # type: ignore[operator]
    while in_tools and (part.category == "arithmetic" or part.context):
        part = _choose(r, TEXTS)(r)  # type: ignore[operator]
    if part.messages[0]["content"] in world.PINNED:
        part.key = "pinned"
    return part


def _tool_parts(r: Random) -> tuple[list[Part], list[Tool]]:
    if r.random() < 0.04:  # asked for, with no tools at all
        part = toolcalls.no_tool_fits(r, [])
        return [part], []
    specs = toolcalls.toolset(r)
    parts: list[Part] = []
    turns = r.choice((1, 1, 1, 1, 1, 2))
    for turn in range(turns):
        kind = r.random()
        if kind < 0.15 and not any(p.category == "no_call" for p in parts):
            part = text_part(r, in_tools=True)
            part.category = "no_call"
        elif kind < 0.31:
            part = toolcalls.no_tool_fits(r, specs)
        else:
            part = toolcalls.call(r, specs, answered=turn < turns - 1 or r.random() < 0.22)
        parts.append(part)
    return parts, [spec.schema() for spec in specs]


def _fits(part: Part, before: list[Part]) -> bool:
    """Return whether the part's answer is still right after the parts before it."""
    if any(p.category == "facts" for p in before) and part.category in ("facts", "unknown"):
        return False
    if part.context and before:
        return False
    return part.messages[-1]["content"] != world.NAME_NOT_TOLD or all(p.category != "copying" for p in before)


def conversation(r: Random, mix: dict[str, float] = MIX) -> Conversation:
    """Generate one random conversation of either split."""
    kind = _choose(r, mix)
    parts: list[Part] = []
    tools: list[Tool] = []
    if kind == "tools":
        parts, tools = _tool_parts(r)
    elif kind == "pinned":
        question = r.choice(list(world.PINNED))
        parts = [ask("pinned", question, world.PINNED[question], key="pinned")]
    else:
        for _ in range(r.choice((1, 1, 1, 1, 1, 2, 3))):
            part = text_part(r)
            if _fits(part, parts):
                parts.append(part)
    contexts = [part.context for part in parts if part.context]
    system = [r.choice(world.SYSTEM_PROMPTS)] if r.random() < 0.15 else []
    single = len(parts) == 1 and len(parts[0].messages) == 2
    # Without a chat template only a full stop or a question mark tells that the question is over.
    ended = single and parts[0].messages[0]["content"][-1] in ".?" and parts[0].category not in ("no_tool", "copying")
    raw = ended and not tools and not contexts and r.random() < (0.5 if kind == "pinned" else 0.15)
    messages: list[Message] = []
    if (system or contexts) and not raw:
        messages.append({"role": "system", "content": "\n".join(system + contexts)})
    for part in parts:
        messages += part.messages
    held = [any(is_held_out(key) for key in _keys(part)) for part in parts]
    last = is_held_out(list(_keys(parts[-1]))[-1])
    return Conversation(("raw_" if raw else "") + parts[-1].category, messages, tools, raw, (any(held), last))


def conversations(split: str, seed: int, count: int, mix: dict[str, float] = MIX) -> Iterator[Conversation]:
    """Generate ``count`` conversations of a split.

    Args:
        split: "train": nothing in it is held out; "held-out": its last answer is.
        seed: Any integer: the same seed gives the same conversations.
        count: How many.
        mix: Share of each kind.
    """
    r = Random(f"{split}-{seed}")
    made = 0
    while made < count:
        example = conversation(r, mix)
        held_anywhere, held_last = example.held_out
        if held_last if split == "held-out" else not held_anywhere:
            made += 1
            yield example


def held_out_set(seed: int, per_category: int, only: str = "") -> list[Conversation]:
    """Generate held-out conversations, equally many per category (or of the one named), no prompt twice."""
    chosen: dict[str, list[Conversation]] = {}
    seen: set[str] = set()
    for example in conversations("held-out", seed, per_category * 60):
        category = "raw" if example.raw else example.category
        if only not in ("", category):
            continue
        bucket = chosen.setdefault(category, [])
        prompt = json.dumps([example.messages[:-1], example.tools])
        if len(bucket) < per_category and prompt not in seen:
            seen.add(prompt)
            bucket.append(example)
            if len(chosen) == (1 if only else CATEGORIES) and all(len(b) == per_category for b in chosen.values()):
                break
    return [example for _, bucket in sorted(chosen.items()) for example in bucket]


def main() -> None:
    """Print conversations as the model sees them."""
    from vocabulary import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("train", "held-out"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--tokenizer", type=Path, default=HERE / "checkpoint")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    for example in conversations(options.split, options.seed, options.count):
        print(f"--- {example.category}\n{example.text(tokenizer)}")


if __name__ == "__main__":
    main()

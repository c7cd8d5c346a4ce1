"""Held-out cases: prompts that no seed ever trains on, with the answers that count as right."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cells import train_demo

CALLS, ANSWERS_PER_CATEGORY = 500, 46  # of eleven categories: 506 answers
CALL_SEED, ANSWER_SEED = 7_000_000, 7_100_000  # used nowhere else
OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Case:
    """A prompt and its answer.

    Attributes:
        number: Place in the list, the same in every run.
        category: Category of data.py.
        prompt: Text, rendered by the chat template.
        answer: Expected answer, without the end token.
        tools: Function schemas in the prompt.
    """

    number: int
    category: str
    prompt: str
    answer: str
    tools: list[dict[str, Any]]

    @property
    def is_call(self) -> bool:
        return self.answer.startswith(OPENING)


def make_cases(tokenizer: Any, calls: int = CALLS, per_category: int = ANSWERS_PER_CATEGORY) -> list[Case]:
    """Return tool calls, then answers of the other categories in turn."""
    data = train_demo("data")
    chosen = data.held_out_set(CALL_SEED, calls, "tool_call")
    others = [e for e in data.held_out_set(ANSWER_SEED, per_category) if not e.answer.startswith(OPENING)]
    chosen += [others[i] for start in range(per_category) for i in range(start, len(others), per_category)]
    return [
        Case(number, "raw" if e.raw else e.category, e.prompt(tokenizer), e.answer, e.tools)
        for number, e in enumerate(chosen)
    ]


def load_cases(file: Path, tokenizer: Any) -> list[Case]:
    """Return the cases of a file, which is written if it isn't there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(case), ensure_ascii=False) for case in make_cases(tokenizer)]
        part = file.with_suffix(".part")
        part.write_text("\n".join(lines) + "\n")
        part.rename(file)
    return [Case(**json.loads(line)) for line in file.read_text().splitlines()]


def call_grammar(case: Case) -> str:
    """Return the Lark grammar of all calls of the case's tools whose arguments obey the tools' schemas.

    No parameter is required, because the prompt doesn't say which are, and expected calls leave some out.
    """
    from flash_moe_mlx.runtime.grammar import JSON_OPTIONS

    rules = []
    for i, tool in enumerate(case.tools):
        function = tool["function"]
        schema = {"additionalProperties": False, **function["parameters"], "required": [], "x-guidance": JSON_OPTIONS}
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        rules += [f'c{i}: {head} a{i} "}}"', f"a{i}: %json {json.dumps(schema, ensure_ascii=False)}"]
    names = " | ".join(f"c{i}" for i in range(len(case.tools)))
    return "\n".join([f'start: {OPENING} "\\n" ({names}) "\\n" {CLOSING}', *rules])

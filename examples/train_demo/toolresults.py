"""Answers of tools, and the sentences that report them."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import toolbox
from sample import made_up_word


def spoken(value: Any) -> str:
    """A value as a request says it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


_RESULT_KEYS = "temperature status total price count result distance time id name message condition balance humidity city answer speed rate weight level".split()


def _result_value(r: Random) -> Any:
    return r.choice(
        [
            toolbox.integer,
            toolbox.number,
            toolbox.word,
            toolbox.phrase,
            toolbox.name,
            toolbox.clock,
            toolbox.identifier,
            toolbox.place,
        ]
    )(r)


def result(r: Random) -> tuple[str, str]:
    """A tool's result as it stands in the prompt, and the sentence that reports it."""
    style = r.random()
    if style < 0.1:
        reason = r.choice(
            [
                f"{toolbox.word(r)} not found",
                "not found",
                "time out",
                "no connection",
                f"unknown {toolbox.word(r)}",
                f"{toolbox.word(r)} is missing",
            ]
        )
        return json.dumps({"error": reason}), f"The tool failed: {reason}."
    if style < 0.35:
        value = spoken(_result_value(r))
        return value, f"The result is {value}."
    keys: list[str] = []
    while len(keys) < 1 or (len(keys) < 3 and r.random() < 0.5):
        key = r.choice(_RESULT_KEYS) if r.random() < 0.65 else made_up_word(r)
        if key not in keys:
            keys.append(key)
    values = {key: _result_value(r) for key in keys}
    said = [f"the {key} is {spoken(v)}" for key, v in values.items()]
    sentence = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    return json.dumps(values, ensure_ascii=False), f"T{sentence[1:]}."

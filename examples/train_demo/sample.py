"""Training examples, and the random words and phrasings that all generators share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from random import Random
from typing import Any

import world

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass
class Part:
    """One self-contained exchange: the messages from a user's request to the last answer it leads to.

    Attributes:
        category: What kind of task it is; scores are reported by category.
        messages: Chat messages, ending with the assistant's.
        tools: OpenAI-style function schemas that must be in the prompt, or none.
        context: Text that must stand in the system message, or none.
        key: What decides train or held-out, where it is not the exchange's own text (both orders of a sum, say).
    """

    category: str
    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    context: str = ""
    key: str = ""


def ask(category: str, question: str, answer: str, **fields: Any) -> Part:
    """Create a part of one question and one answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Part(category, messages, **fields)


_ONSETS = "b c d f g h j k l m n p q r s t v w x y z br ch cl dr fl gr kr pl qu sh sk sl st th tr wh zw".split()
_VOWELS = "a e i o u a e i o u ai ea ee ie oo ou y ia".split()
_CODAS = ["", "", "", *"b d g k l m n p r s t x z ck ll nd ng nt rn sh ss st th".split()]


def made_up_word(r: Random) -> str:
    """Make up a lower-case word without meaning, of 3 to 10 letters."""
    word = "".join(r.choice(_ONSETS) + r.choice(_VOWELS) + r.choice(_CODAS) for _ in range(r.choice((1, 2, 2, 2, 3))))
    return word[:10] if len(word) > 2 else word + r.choice("anorel")


def name(r: Random) -> str:
    """Choose a person's name, half of them made up; one in twelve in lower case, as people type."""
    chosen = r.choice(world.NAMES) if r.random() < 0.5 else made_up_word(r).capitalize()
    return chosen.lower() if r.random() < 0.08 else chosen


def place(r: Random) -> str:
    """Choose a town, a third of them made up."""
    return r.choice(world.PLACES) if r.random() < 0.65 else made_up_word(r).capitalize()


def distinct(r: Random, count: int, make: Any) -> list[Any]:
    """Return ``count`` different values of ``make(r)``."""
    values: list[Any] = []
    while len(values) < count:
        value = make(r)
        if str(value).lower() not in [str(v).lower() for v in values]:
            values.append(value)
    return values


_FIELD = re.compile(r"(\{\w+\})")


def _outside_fields(template: str, change: Any) -> str:
    return "".join(p if p.startswith("{") else change(p) for p in _FIELD.split(template))


def vary(r: Random, template: str, **values: Any) -> str:
    """Fill a template the way people type: sometimes in lower case, sometimes without the final mark.

    The values themselves are left as they are, since answers copy them.
    """
    style = r.random()
    if style < 0.33:
        template = template.rstrip(".?!") if style > 0.08 else template
        if style < 0.20:
            template = _outside_fields(template, str.lower)
    elif style < 0.35:
        template = _outside_fields(template, str.upper)
    return template.format(**values)


def vary_all(r: Random, template: str, **values: Any) -> str:
    """Vary phrasings like ``vary``, for closed tables: the values change case with the rest."""
    return vary(r, template.format(**values))


def with_article(word: str) -> str:
    """Return the word with "a" or "an"."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word

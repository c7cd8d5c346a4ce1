"""Questions about facts listed in the prompt: the answer is copied from them, or they do not say.

Questions name who or what the fact is about. The other way round ("Who likes tea?") the trained model is right only
about half the time, so that is not part of its world.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import world
from sample import Part, ask, distinct, made_up_word, name, place, vary

NOT_SAID = "The facts do not say that."

# A fact: its sentence, then question templates with their answers. {n} is who or what it is about.
Template = tuple[str, list[tuple[str, str]]]
_KINDS: dict[str, Template] = {
    "has": ("{n} has a {c} {t}.", [
        ("What does {n} have?", "{n} has a {c} {t}."), ("What colour is the {t} of {n}?", "The {t} of {n} is {c}."),
        ("What color is {n}'s {t}?", "{n}'s {t} is {c}."), ("What colour is {n}'s {t}?", "{n}'s {t} is {c}.")]),
    "lives": ("{n} lives in {p}.", [
        ("Where does {n} live?", "{n} lives in {p}."), ("In which city does {n} live?", "{n} lives in {p}.")]),
    "age": ("{n} is {a} years old.", [
        ("How old is {n}?", "{n} is {a} years old."), ("What is the age of {n}?", "{n} is {a} years old.")]),
    "likes": ("{n} likes {f}.", [("What does {n} like?", "{n} likes {f}.")]),
    "job": ("{n} is a {j}.", [
        ("What does {n} do?", "{n} is a {j}."), ("What is the job of {n}?", "{n} is a {j}.")]),
    "where": ("The {t} is in the {o}.", [("Where is the {t}?", "The {t} is in the {o}.")]),
    "price": ("The {t} costs {a} dollars.", [
        ("How much is the {t}?", "The {t} costs {a} dollars."),
        ("How much does the {t} cost?", "The {t} costs {a} dollars.")]),
}  # fmt: skip
_ROOMS = "kitchen garden garage cellar attic hall office bedroom library shed".split()
# Fields that a question may name, so that two facts of a prompt never share one.
_VALUES: dict[str, Callable[[Random], str]] = {
    "n": name,
    "c": lambda r: r.choice(world.COLOUR_WORDS),
    "t": lambda r: r.choice(world.THINGS) if r.random() < 0.85 else made_up_word(r),
    "p": place,
    "a": lambda r: str(r.randint(3, 99)),
    "f": lambda r: r.choice(world.FOODS) if r.random() < 0.85 else made_up_word(r),
    "j": lambda r: r.choice(world.JOBS),
    "o": lambda r: r.choice(_ROOMS),
}


def facts(r: Random) -> Part:
    """Generate two to five facts, then one to three questions about them."""
    count = r.randint(2, 5)
    columns = {key: distinct(r, count + 1, make) for key, make in _VALUES.items()}
    kinds = [r.choice(list(_KINDS)) for _ in range(count)] if r.random() < 0.6 else [r.choice(list(_KINDS))] * count
    fields = [{key: column[i] for key, column in columns.items()} for i in range(count + 1)]
    sentences = [_KINDS[kind][0].format(**fields[i]) for i, kind in enumerate(kinds)]
    layout = r.random()
    if layout < 0.7:
        listed = r.choice(["Facts: ", "Facts: ", "", "Here are some facts: ", "Context: "]) + " ".join(sentences)
        joint = r.choice([" ", "\n"])
    else:
        listed = r.choice(["Facts:\n", "", "Here are some facts:\n"]) + "\n".join(
            r.choice(["", "- "]) + s for s in sentences
        )
        joint = "\n"
    questions = [_question(r, kinds, fields) for _ in range(r.choice((1, 1, 1, 1, 2, 3)))]
    in_system = r.random() < 0.15
    part = Part("facts", [], context=listed if in_system else "")
    for i, (question, answer) in enumerate(questions):
        if i == 0 and not in_system:
            question = listed + joint + r.choice(["", "Question: ", "Q: "]) + question
        part.messages += ask("facts", question, answer).messages
    return part


def _question(r: Random, kinds: list[str], fields: list[dict[str, str]]) -> tuple[str, str]:
    if r.random() < 0.15:  # about someone or something that the facts do not mention
        kind = r.choice(list(_KINDS))
        question, _ = r.choice(_KINDS[kind][1])
        return vary(r, question, **fields[-1]), NOT_SAID
    i = r.randrange(len(kinds))
    question, answer = r.choice(_KINDS[kinds[i]][1])
    return vary(r, question, **fields[i]), answer.format(**fields[i])

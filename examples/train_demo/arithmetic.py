"""Arithmetic with numbers up to 99, in digits and in words. The answer repeats the question's numbers."""

from __future__ import annotations

from random import Random

import world
from sample import Part, ask, distinct, name, vary, vary_all

TOO_BIG = "I can only work with numbers up to 99."

_ADD = ["What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?",
        "How much is {a} plus {b}?", "Calculate {a} + {b}.", "What is the sum of {a} and {b}?", "{a} plus {b}?",
        "Can you add {a} and {b}?", "Please add {a} and {b}.", "Compute {a} plus {b}.", "What's {a} + {b}?"]  # fmt: skip
_SUBTRACT = ["What is {a} - {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b}", "{a}-{b}",
             "{a} - {b} = ?", "How much is {a} minus {b}?", "Calculate {a} - {b}.", "Take {b} away from {a}.",
             "{a} minus {b}?", "Can you subtract {b} from {a}?", "Compute {a} minus {b}.", "What's {a} - {b}?"]  # fmt: skip
_TIMES = ["What is {a} times {b}?", "What is {a} * {b}?", "{a} x {b}", "{a} * {b}", "Multiply {a} by {b}.",
          "How much is {a} times {b}?", "{a} times {b}?"]  # fmt: skip


def sums(r: Random) -> Part:
    """Generate additions and subtractions of numbers to 99, in digits. The pair of numbers decides train or held-out."""
    a, b = r.randint(0, 99), r.randint(0, 99)
    if r.random() < 0.55:
        key = f"{min(a, b)}+{max(a, b)}"
        return ask("arithmetic", vary(r, r.choice(_ADD), a=a, b=b), f"{a} plus {b} is {a + b}.", key=key)
    a, b = max(a, b), min(a, b)
    return ask("arithmetic", vary(r, r.choice(_SUBTRACT), a=a, b=b), f"{a} minus {b} is {a - b}.", key=f"{a}-{b}")


def small_arithmetic(r: Random) -> Part:
    """Generate times tables, sums in words, comparisons, counting, and numbers that are too big."""
    kind = r.randrange(7)
    words = world.NUMBER_WORDS
    if kind == 0:
        a, b = r.randint(0, 10), r.randint(0, 10)
        return ask("arithmetic", vary(r, r.choice(_TIMES), a=a, b=b), f"{a} times {b} is {a * b}.")
    if kind == 1:
        a, b = r.randint(0, 12), r.randint(0, 12)
        question = r.choice(["What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?", "{a} plus {b}"])
        answer = f"{words[a].capitalize()} plus {words[b]} is {words[a + b]}."
        return ask("arithmetic", vary_all(r, question, a=words[a], b=words[b]), answer)
    if kind == 2:
        a = r.randint(0, 20)
        b = r.randint(0, a)
        question = r.choice(["What is {a} minus {b}?", "Subtract {b} from {a}.", "How much is {a} minus {b}?"])
        answer = f"{words[a].capitalize()} minus {words[b]} is {words[a - b]}."
        return ask("arithmetic", vary_all(r, question, a=words[a], b=words[b]), answer)
    if kind == 3:
        a, b = distinct(r, 2, lambda r: r.randint(0, 99))
        if r.random() < 0.5:
            word = r.choice(["larger", "bigger"])
            return ask(
                "arithmetic",
                vary(r, f"Which is {word}, {{a}} or {{b}}?", a=a, b=b),
                f"{max(a, b)} is {word} than {min(a, b)}.",
            )
        return ask(
            "arithmetic",
            vary(r, "Which is smaller, {a} or {b}?", a=a, b=b),
            f"{min(a, b)} is smaller than {max(a, b)}.",
        )
    if kind == 4:
        a = r.randint(1, 98)
        if r.random() < 0.5:
            return ask(
                "arithmetic",
                vary(r, r.choice(["What comes after {a}?", "Which number comes after {a}?"]), a=a),
                f"{a + 1} comes after {a}.",
            )
        return ask(
            "arithmetic",
            vary(r, r.choice(["What comes before {a}?", "Which number comes before {a}?"]), a=a),
            f"{a - 1} comes before {a}.",
        )
    if kind == 5:
        a, b = r.randint(100, 9999), r.choice((r.randint(0, 99), r.randint(100, 9999)))
        a, b = (a, b) if r.random() < 0.5 else (b, a)
        return ask("arithmetic", vary(r, r.choice(_ADD + _SUBTRACT), a=a, b=b), TOO_BIG)
    person, thing = name(r), r.choice(world.THINGS)
    a, b = r.randint(2, 30), r.randint(2, 20)
    if r.random() < 0.5:
        question = r.choice(["{n} has {a} {t}s and gets {b} more. How many {t}s does {n} have?",
                             "{n} has {a} {t}s. {n} buys {b} more. How many {t}s does {n} have now?"])  # fmt: skip
        return ask(
            "arithmetic",
            vary(r, question, n=person, a=a, b=b, t=thing),
            f"{a} plus {b} is {a + b}. {person} has {a + b} {thing}s.",
        )
    a += b
    question = r.choice(["{n} has {a} {t}s and gives away {b}. How many {t}s does {n} have left?",
                         "{n} has {a} {t}s. {n} loses {b}. How many {t}s are left?"])  # fmt: skip
    return ask(
        "arithmetic",
        vary(r, question, n=person, a=a, b=b, t=thing),
        f"{a} minus {b} is {a - b}. {person} has {a - b} {thing}s.",
    )


def arithmetic(r: Random) -> Part:
    """Generate arithmetic, sums twice as often as the rest."""
    return sums(r) if r.random() < 0.65 else small_arithmetic(r)

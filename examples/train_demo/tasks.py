"""Text tasks: stories, talk, world knowledge, and honest "I do not know". See also arithmetic.py and facts.py.

Each generator takes a ``random.Random`` and returns a ``Part`` whose answer follows from the question alone.
"""

from __future__ import annotations

from random import Random

import world
from sample import Part, ask, made_up_word, name, place, vary, vary_all, with_article

DO_NOT_KNOW = "I do not know that. I am only a small demo model."

_STORY_ASK = ["Tell me a story about {x}.", "Tell a story about {x}.", "Write a short story about {x}.",
              "Write a story about {x}.", "Can you tell me a story about {x}?", "I want a story about {x}.",
              "Please tell me a story about {x}.", "A story about {x}, please.", "Make up a story about {x}."]  # fmt: skip
_ANY_STORY = ["Tell me a story.", "Tell a story.", "Write a story.", "Write a short story.", "Once upon a time"]


def story(r: Random) -> Part:
    """Generate a story about the animal, thing and name asked for, which decide its plot."""
    if r.random() < 0.02:
        return ask("story", vary(r, r.choice(_ANY_STORY)), world.ANY_STORY)
    colour = (
        r.choice([*world.COLOUR_WORDS, "little", "old", "brave", "lazy", "clever", "tiny"]) if r.random() < 0.7 else ""
    )
    adjective = colour + " " if colour else ""
    person = name(r) if r.random() < 0.75 else ""
    if r.random() < 0.6:
        animal = r.choice(list(world.ANIMALS)) if r.random() < 0.85 else made_up_word(r)
        home, loves = world.ANIMALS.get(animal, ("hidden valley", "looking at the stars"))
        subject = with_article(adjective + animal)
        if not person:
            text = (f"Once there was {subject} who lived in the {home}. The {animal} loved {loves}. "
                    f"One day it rained, and the {animal} went home to wait for the sun.")  # fmt: skip
            return ask("story", vary(r, r.choice(_STORY_ASK), x=subject), text)
        if r.random() < 0.25:
            subject_named = f"{subject} {r.choice(['named', 'called'])} {person}"
            text = (f"Once there was {subject} named {person} who lived in the {home}. {person} loved {loves}. "
                    f"One day {person} met a new friend, and they played until the sun went down.")  # fmt: skip
            return ask("story", vary(r, r.choice(_STORY_ASK), x=subject_named), text)
        pair = f"{person} and {subject}" if r.random() < 0.75 else f"{subject} and {person}"
        text = (f"Once there was {subject} who lived in the {home}. One day {person} came by and said hello. "
                f"The {animal} loved {loves}, so they did that all day. In the evening {person} went home, and the "
                f"{animal} slept well.")  # fmt: skip
        return ask("story", vary(r, r.choice(_STORY_ASK), x=pair), text)
    thing = r.choice(list(world.STORY_THINGS))
    where = world.STORY_THINGS[thing]
    subject = with_article(adjective + thing)
    if not person:
        text = f"Long ago there was {subject} {where}. Nobody knew who had made it. One night the {thing} began to shine, and everyone was happy."
        return ask("story", vary(r, r.choice(_STORY_ASK), x=subject), text)
    text = (f"One day {person} found {subject} {where}. {person} took the {adjective}{thing} home and showed it to everyone. "
            f"From then on the {thing} brought good luck.")  # fmt: skip
    return ask("story", vary(r, r.choice(_STORY_ASK), x=f"{person} and {subject}"), text)


def talk(r: Random) -> Part:
    """Generate greetings, thanks and introductions with fixed answers."""
    ways, answer = r.choice(world.TALK)
    way = r.choice(ways)
    return ask("talk", vary(r, way if way[-1] in "?." else way + r.choice(["", "!", "."])), answer)


def copying(r: Random) -> Part:
    """Generate names and phrases that the user gives and the model repeats."""
    person = name(r)
    kind = r.randrange(4)
    if kind == 0:
        question = r.choice(["My name is {n}.", "I am called {n}.", "Hello, my name is {n}.", "Hi, I'm {n}."])
        return ask("copying", vary(r, question, n=person), f"Nice to meet you, {person}.")
    if kind == 1:
        question = r.choice(["Say hello to {n}.", "Greet {n}.", "Say hi to {n}."])
        return ask("copying", vary(r, question, n=person), f"Hello, {person}!")
    if kind == 2:
        part = ask(
            "copying",
            vary(r, r.choice(["My name is {n}.", "I am called {n}."]), n=person),
            f"Nice to meet you, {person}.",
        )
        question = vary(
            r, r.choice(["What is my name?", "Who am I?", "Do you know my name?", "Do you remember my name?"])
        )
        part.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"Your name is {person}."},
        ]
        return part
    phrase = " ".join(
        made_up_word(r) if r.random() < 0.4 else r.choice(world.THINGS + world.COLOUR_WORDS + world.COMMON)
        for _ in range(r.randint(1, 5))
    )
    return ask("copying", vary(r, r.choice(["Repeat: {p}", "Say: {p}", "Repeat after me: {p}"]), p=phrase), phrase)


def _world(r: Random) -> tuple[str, str]:
    kind = r.randrange(11)
    if kind == 0:
        country, capital = r.choice(list(world.CAPITALS.items()))
        ways = ["What is the capital of {x}?", "What's the capital of {x}?", "Which city is the capital of {x}?", "Capital of {x}?",
                "Tell me the capital of {x}.", "Name the capital of {x}."]  # fmt: skip
        return vary_all(r, r.choice(ways), x=country), f"The capital of {country} is {capital}."
    if kind == 1:
        country, capital = r.choice(list(world.CAPITALS.items()))
        return vary_all(
            r, r.choice(["Which country has the capital {x}?", "{x} is the capital of which country?"]), x=capital
        ), f"{capital} is the capital of {country}."
    if kind == 2:
        thing, colour = r.choice(list(world.COLOURS.items()))
        ways = ["What colour is {x}?", "What color is {x}?", "Which colour is {x}?", "Which color is {x}?"]
        return vary_all(r, r.choice(ways), x=thing), f"{thing.capitalize()} is {colour}."
    if kind == 3:
        a, b = r.choice(list(world.OPPOSITES.items()))
        a, b = (a, b) if r.random() < 0.5 else (b, a)
        ways = [
            "What is the opposite of {x}?",
            "Opposite of {x}?",
            "Tell me the opposite of {x}.",
            "What's the opposite of {x}?",
        ]
        return vary_all(r, r.choice(ways), x=a), f"The opposite of {a} is {b}."
    if kind == 4:
        animal, sound = r.choice(list(world.SOUNDS.items()))
        ways = ["What sound does a {x} make?", "What does a {x} say?", "Which sound does a {x} make?"]
        return vary_all(r, r.choice(ways), x=animal), f"A {animal} says {sound}."
    if kind == 5:
        animal, legs = r.choice(list(world.LEGS.items()))
        subject = with_article(animal)
        return vary_all(
            r, r.choice(["How many legs does {x} have?", "How many legs has {x}?"]), x=subject
        ), f"{subject.capitalize()} has {legs} legs."
    if kind == 6:
        what, answer = r.choice(list(world.COUNTS.items()))
        return vary_all(r, "How many {x}?", x=what), answer + "."
    if kind == 7:
        thing, kind_of = r.choice(list(world.KINDS.items()))
        asked = kind_of if r.random() < 0.5 else r.choice(sorted(set(world.KINDS.values())))
        answer = ("Yes, " if asked == kind_of else "No, ") + f"{thing} is {with_article(kind_of)}."
        return vary_all(r, "Is {x} {y}?", x=with_article(thing), y=with_article(asked)), answer.replace(
            thing, with_article(thing), 1
        )
    if kind in (8, 9):
        names, what = (world.DAYS, "day") if kind == 8 else (world.MONTHS, "month")
        i = r.randrange(len(names))
        if r.random() < 0.5:
            return vary_all(
                r, r.choice(["What comes after {x}?", f"Which {what} comes after {{x}}?"]), x=names[i]
            ), f"{names[(i + 1) % len(names)]} comes after {names[i]}."
        return vary_all(
            r, r.choice(["What comes before {x}?", f"Which {what} comes before {{x}}?"]), x=names[i]
        ), f"{names[i - 1]} comes before {names[i]}."
    what, answer = (
        ("mixture-of-experts", world.DEFINITIONS["mixture-of-experts"])
        if r.random() < 0.2
        else r.choice(list(world.DEFINITIONS.items()))
    )
    ways = [
        "What is {x}?",
        "Explain {x}.",
        "Explain {x} in one line.",
        "Define {x}.",
        "What's {x}?",
        "Tell me what {x} is.",
        "Explain {x} in one sentence.",
        "Can you explain {x}?",
    ]
    return vary_all(r, r.choice(ways), x=r.choice([what, *world.ALIASES.get(what, [])])), answer


def knowledge(r: Random) -> Part:
    """Generate questions about the closed tables."""
    return ask("knowledge", *_world(r))


_HARD = ["Who invented the {w}?", "Who is the president of {p}?", "When was {n} born?", "Why do {w}s {v}?", "How do I {v} a {w}?",
         "What is the population of {p}?", "How tall is {n}?", "Write an essay about {w}s.", "What is the meaning of life?",
         "Give me a recipe for {f}.", "How old is {n}?", "What is the best {w}?", "Who wrote {n}?", "Where can I buy {f}?",
         "Why is the {w} {c}?", "What will happen tomorrow?", "How far is {p} from here?", "Who won the game in {p}?",
         "Write a program that {v}s a {w}.", "Is {n} taller than {m}?", "What do you think about {p}?", "Who is {n}?",
         "When did {n} {v}?", "How does a {w} work?", "What should I {v}?", "Summarize the book {n}.", "Where is {n}?"]  # fmt: skip


def unknown(r: Random) -> Part:
    """Generate questions about things that are made up or outside the closed world."""
    kind = r.randrange(6)
    word = made_up_word(r)
    if kind == 0:
        return ask(
            "unknown",
            vary(
                r,
                r.choice(["What is the capital of {x}?", "Capital of {x}?", "Tell me the capital of {x}."]),
                x=word.capitalize(),
            ),
            f"I do not know the capital of {word.capitalize()}.",
        )
    if kind == 1:
        return ask(
            "unknown",
            vary(r, r.choice(["What is {x}?", "Explain {x}.", "What's {x}?"]), x=with_article(word)),
            f"I do not know what {with_article(word)} is.",
        )
    if kind == 2:
        return ask(
            "unknown",
            vary(r, r.choice(["What colour is {x}?", "What color is {x}?"]), x=with_article(word)),
            f"I do not know what colour {with_article(word)} is.",
        )
    verb = r.choice(["build", "fix", "paint", "sing", "sleep", "run", "fly", "cook", "learn", "buy", "draw", word])
    fields = {
        "w": r.choice([*world.THINGS, word]),
        "p": place(r),
        "n": name(r),
        "m": name(r),
        "v": verb,
        "f": r.choice(world.FOODS),
        "c": r.choice(world.COLOUR_WORDS),
    }
    return ask("unknown", vary(r, r.choice(_HARD), **fields), DO_NOT_KNOW)

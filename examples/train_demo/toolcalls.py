"""Tool-calling exchanges: a request and its call, and what to say about the tool's result."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any

import toolbox
from sample import Message, Part, Tool, made_up_word, vary
from toolbox import Kind
from toolresults import result, spoken

NO_TOOL = "I do not have a tool for that."


@dataclass
class Spec:
    """A tool: its schema's parts and how people ask for it.

    Attributes:
        name: Function name.
        description: One line, or empty.
        parameters: Field of the request templates -> (parameter's name in the schema, kind, JSON type).
        requests: Templates with fields, or empty for tools composed from a verb and a noun.
        verb: The verb of a composed tool.
        noun: Its noun.
    """

    name: str
    description: str
    parameters: dict[str, tuple[str, Kind, str]]
    requests: list[str]
    verb: str = ""
    noun: str = ""

    def schema(self) -> Tool:
        """The OpenAI-style function schema."""
        properties = {name: {"type": kind} for name, _, kind in self.parameters.values()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


def _type(r: Random, kind: Kind) -> str:
    return "string" if kind.type in ("integer", "number") and r.random() < 0.1 else kind.type


def _tool_name(r: Random, words: list[str]) -> str:
    """Words joined as in snake_case, camelCase, with dots or dashes."""
    style = r.random()
    if style < 0.65:
        return "_".join(words)
    if style < 0.85:
        return words[0] + "".join(w.capitalize() for w in words[1:])
    return r.choice([".", "-", ""]).join(words)


def natural(r: Random) -> Spec:
    """One of the natural tools, its name and parameters' names sometimes changed."""
    name, description, kinds, requests = r.choice(toolbox.NATURAL)
    parameters: dict[str, tuple[str, Kind, str]] = {}
    for field, kind_name in kinds.items():
        kind = toolbox.KINDS[kind_name]
        called = field if r.random() < 0.6 else r.choice(kind.names.split())
        if called in [p[0] for p in parameters.values()] or (called != field and called in kinds):
            called = field
        parameters[field] = (called, kind, _type(r, kind))
    style = r.random()
    if style < 0.3:
        name = _tool_name(r, name.split("_"))
    elif style < 0.38:
        name = made_up_word(r)
    lower = description[0].lower() + description[1:]
    described = r.choice(
        [
            description,
            description,
            description,
            description[:-1],
            f"Use this to {lower}",
            f"A tool to {lower}",
            f"{description[:-1]} for the user.",
        ]
    )
    return Spec(name, described if r.random() < 0.9 or style < 0.38 else "", parameters, requests)


def composed(r: Random) -> Spec:
    """A tool made of a verb and a noun, the noun real or made up, with one to three parameters."""
    verb = r.choice(toolbox.VERBS)
    noun = r.choice(toolbox.NOUNS) if r.random() < 0.72 else made_up_word(r)
    parameters: dict[str, tuple[str, Kind, str]] = {}
    links: set[str] = set()
    for i in range(r.choice((1, 1, 2, 2, 3))):
        kind = (
            r.choice(toolbox.MADE_UP_KINDS)
            if r.random() < 0.4
            else r.choice([k for k in toolbox.KINDS.values() if k.links or k.type == "boolean"])
        )
        called = r.choice(kind.names.split()) if kind.names else made_up_word(r)
        if called in [p[0] for p in parameters.values()] or links & set(kind.links.split("|")) - {""}:
            continue
        links |= set(kind.links.split("|"))
        parameters[f"p{i}"] = (called, kind, _type(r, kind))
    described = r.choice(
        [
            f"{verb.capitalize()} a {noun}.",
            f"{verb.capitalize()} the {noun}.",
            f"Tool to {verb} a {noun}.",
            f"Use this to {verb} a {noun}.",
            f"{verb} {noun}",
        ]
    )
    return Spec(_tool_name(r, [verb, noun]), described if r.random() < 0.85 else "", parameters, [], verb, noun)


def toolset(r: Random) -> list[Spec]:
    """One to four tools that can be told apart."""
    tools: list[Spec] = []
    for _ in range(r.choice((1, 2, 2, 3, 3, 4))):
        tool = natural(r) if r.random() < 0.45 else composed(r)
        if not any(_similar(tool, other) or _shares_word(tool, other) for other in tools):
            tools.append(tool)
    r.shuffle(tools)
    return tools


def _shares_word(a: Spec, b: Spec) -> bool:
    return bool({a.verb, a.noun} & {b.verb, b.noun} - {""})


def _similar(a: Spec, b: Spec) -> bool:
    if a.name == b.name or (a.verb, a.noun) == (b.verb, b.noun) != ("", ""):
        return True
    if bool(a.verb) == bool(b.verb):
        return bool(set(a.requests) & set(b.requests))
    made, told = (a, b) if a.verb else (b, a)
    return made.noun in " ".join(told.requests).lower() or made.noun in told.name.lower()


def request(r: Random, tool: Spec) -> tuple[str, dict[str, Any]]:
    """A user's request for this tool, and the arguments of the call it asks for."""
    values = {field: kind.value(r) for field, (_, kind, _) in tool.parameters.items()}
    if not tool.requests and len(values) > 1 and r.random() < 0.15:
        del values[r.choice(list(values))]  # an optional parameter that the user does not give
    explicit = r.random() < 0.1
    if tool.requests and not explicit:
        template = r.choice(tool.requests)
        values = {field: v for field, v in values.items() if f"{{{field}}}" in template}
        if not re.search(r"\{\w+\}.?$", template) and r.random() < 0.15:
            template = r.choice(["Please ", "Hey, ", "Can you help? "]) + template
        text = vary(r, template, **{f: spoken(v) for f, v in values.items()})
    elif explicit:
        text = _explicit(r, tool, values)
    else:
        text = _composed_request(r, tool, values)
    arguments = {}
    for field, (name, kind, declared) in tool.parameters.items():
        if field in values:
            arguments[name] = str(values[field]) if declared == "string" and kind.type != "string" else values[field]
    return text, arguments


def _explicit(r: Random, tool: Spec, values: dict[str, Any]) -> str:
    named = [(tool.parameters[f][0], spoken(v)) for f, v in values.items()]
    style = r.randrange(3)
    if style == 0:
        return (
            f"{r.choice(['Call', 'Use', 'call', 'Run'])} {tool.name} with "
            + ", ".join(f"{p}={v}" for p, v in named)
            + r.choice(["", "."])
        )
    if style == 1:
        return (
            f"{r.choice(['Call', 'Use', 'use', 'Please call'])} {tool.name} with "
            + " and ".join(f"{p} {v}" for p, v in named)
            + r.choice(["", "."])
        )
    return f"{tool.name} " + " ".join(f"{p}={v}" for p, v in named)


def _composed_request(r: Random, tool: Spec, values: dict[str, Any]) -> str:
    template = ""
    fields = list(values)
    if r.random() < 0.3:
        r.shuffle(fields)
    named = False
    for field in fields:
        called, kind, _ = tool.parameters[field]
        shown = called.replace("_", " ") if r.random() < 0.3 else called
        if kind.type == "boolean":
            on = values[field]
            piece = "with {}".format(
                r.choice(
                    [
                        f"{shown} {'on' if on else 'off'}",
                        f"{shown} set to {'true' if on else 'false'}",
                        f"{shown} {'true' if on else 'false'}",
                    ]
                )
            )
        elif kind.links and r.random() < 0.75:
            piece = f"{r.choice(kind.links.split('|'))} {{{field}}}"
        else:
            lead = r.choice(["with ", "with ", "and "]) if not named else r.choice(["and ", "and with "])
            piece = lead + shown + r.choice([" ", " ", " set to ", "="]) + f"{{{field}}}"
            named = True
        template += " " + piece
    article = r.choice(["a ", "the ", "my ", ""])
    lead, mark = r.choice(
        [
            ("", "."),
            ("", "."),
            ("Please ", "."),
            ("Can you ", "?"),
            ("Could you ", "?"),
            ("I want to ", "."),
            ("I need to ", "."),
            ("I would like to ", "."),
            ("Hey, ", "."),
        ]
    )
    start = f"{lead}{tool.verb} {article}{tool.noun}"
    return vary(r, start[0].upper() + start[1:] + template + mark, **{f: spoken(v) for f, v in values.items()})


def call(r: Random, tools: list[Spec], *, answered: bool) -> Part:
    """A request that one of the tools serves: its call, and with ``answered`` the result and what to say about it."""
    tool = r.choice(tools)
    text, arguments = request(r, tool)
    messages: list[Message] = [
        {"role": "user", "content": text},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": tool.name, "arguments": arguments}}],
        },
    ]
    if answered:
        content, sentence = result(r)
        messages += [{"role": "tool", "content": content}, {"role": "assistant", "content": sentence}]
    return Part("tool_answer" if answered else "tool_call", messages, tools=[t.schema() for t in tools])


_TEXT_ANSWERS = {"calculate", "translate", "define_word", "read_file", "get_distance", "get_stock_price"}


def no_tool_fits(r: Random, tools: list[Spec]) -> Part:
    """A request for a tool that is not among those in the prompt."""
    told = " ".join(f"{t.name} {t.description} {' '.join(t.requests)}" for t in tools).lower()
    while True:
        tool = natural(r) if r.random() < 0.6 else composed(r)
        if tool.verb and (tool.verb in told or tool.noun in told):
            continue
        texts = {spec[0] for spec in toolbox.NATURAL if spec[3] == tool.requests} & _TEXT_ANSWERS
        if not texts and not any(_similar(tool, t) or tool.name in t.name for t in tools):
            break
    tool.requests = [q for q in tool.requests if not q.startswith("Search for")]
    text, _ = request(r, tool)
    messages: list[Message] = [{"role": "user", "content": text}, {"role": "assistant", "content": NO_TOOL}]
    return Part("no_tool", messages, tools=[t.schema() for t in tools])

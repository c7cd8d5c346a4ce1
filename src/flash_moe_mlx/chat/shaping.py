"""Messages in the form that a model's chat template takes, found by trying it once.

Templates disagree: some take one system message at the beginning and refuse or drop others, some join a call's
arguments as text and others go through them, some want ids of nine letters. What a template does with a few small
conversations tells which form it needs; that is remembered with the template.
"""

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from transformers.utils.chat_template_utils import get_json_schema

from ..errors import RequestError
from .calls import read_arguments
from .dialect import dialect_of, template_of
from .inline_thinking import has_reasoning, split_thinking
from .template import NULL, TemplateFailure, render_templates

Message = dict[str, Any]

NINE_LETTERS = re.compile(r"[a-zA-Z0-9]{9}")
_KIMI = re.compile(r"functions\..+:\d+", re.DOTALL)
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class TemplateForm:
    """The forms of messages that a chat template accepts.

    Attributes:
        several_systems: Several system messages at the beginning.
        late_system: A system message after others.
        any_system: A system message at all; else its text goes before the first message of the user.
        same_role_twice: Several messages of the user, or of the assistant, after each other.
        arguments_as_text: A call's arguments as JSON text rather than as an object.
        nine_letters: Ids of calls with nine letters or digits, and no others.
        null_content: Calls only in messages whose content is null.
        results: Calls, and their results.
    """

    several_systems: bool = True
    late_system: bool = True
    any_system: bool = True
    same_role_twice: bool = True
    arguments_as_text: bool = False
    nine_letters: bool = False
    null_content: bool = False
    results: bool = True


_forms: "WeakKeyDictionary[Any, tuple[str, TemplateForm]]" = WeakKeyDictionary()


def template_form(tokenizer: Any) -> TemplateForm:
    """Return what a tokenizer's template takes, found at the first call and again for another template.

    Raises:
        RequestError: If the template has no end within the time or memory that it is given.
    """
    key = template_of(tokenizer)
    known = _forms.get(tokenizer)
    if known is None or known[0] != key:
        known = _forms[tokenizer] = (key, _try(tokenizer))
    return known[1]


def shape_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return messages in the form that the template takes.

    Args:
        tokenizer: From :func:`flash_moe_mlx.load`; has a chat template.
        messages: In OpenAI's form; arguments of calls may be objects or JSON text, contents texts, parts or nothing.

    Raises:
        RequestError: As :func:`template_form`.
    """
    if not all(isinstance(message, Mapping) for message in messages):
        raise RequestError("[messages] must be objects with role and content, got others. See docs/server.md.")
    form = template_form(tokenizer)
    shaped = [_with_reasoning(tokenizer, _normal(message)) for message in messages]
    shaped = _with_ids(shaped, _id_style(tokenizer, form))
    shaped = _with_systems(shaped, form)
    if not form.results:
        shaped = [_as_words(message) for message in shaped]
    if not form.same_role_twice:
        shaped = _merged(shaped)
    if form.arguments_as_text:
        shaped = [_with_text_arguments(message) for message in shaped]
    return _with_null_contents(shaped) if form.null_content else shaped


def shape_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tools without what is null: templates join descriptions to other text."""
    if not tools:
        return None
    return [_without_nulls(tool if isinstance(tool, Mapping) else get_json_schema(tool)) for tool in tools]


def with_descriptions(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools that all have a description, an empty one where they had none."""
    return [{**tool, "function": {"description": "", **tool.get("function", {})}} for tool in tools]


def call_id_style(tokenizer: Any) -> str:
    """Return the form of ids that the template wants: "nine", "kimi" or "any"."""
    return _id_style(tokenizer, template_form(tokenizer))


def _id_style(tokenizer: Any, form: TemplateForm) -> str:
    return "nine" if form.nine_letters else dialect_of(tokenizer).ids


# Trying.


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _try(tokenizer: Any) -> TemplateForm:
    """Look at what the template makes of small conversations."""

    def system(text: str) -> Message:
        return {"role": "system", "content": text}

    def call(arguments: Any, call_id: str, content: Any = "") -> list[Message]:
        called = {"id": call_id, "type": "function", "function": {"name": "probe_f", "arguments": arguments}}
        return [
            _user("probe_u"),
            {"role": "assistant", "content": content, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": call_id, "name": "probe_f", "content": "probe_r"},
        ]

    answered = [_user("probe_u"), {"role": "assistant", "content": "probe_a"}]
    given, nine, own = {"probe_k": "probe_v"}, "prob3prob", "probe-id_0"
    tried: dict[str, list[Message]] = {
        "plain": [_user("probe_u")],
        "system": [system("probe_s"), _user("probe_u")],
        "systems": [system("probe_s"), system("probe_t"), _user("probe_u")],
        "late": [system("probe_s"), *answered, system("probe_t"), _user("probe_w")],
        "twice": [_user("probe_u"), _user("probe_w")],
        "object": call(given, own),
        "text": call(json.dumps(given), own),
        "nine object": call(given, nine),
        "nine text": call(json.dumps(given), nine),
        "null object": call(given, own, NULL),
        "null text": call(json.dumps(given), own, NULL),
    }
    results = dict(
        zip(tried, render_templates(tokenizer, list(tried.values()), generate=[False] * len(tried)), strict=True)
    )

    def shows(name: str, *words: str) -> bool:
        text = results[name]
        return isinstance(text, str) and all(word in text for word in words)

    nine_letters = not (_takes(results["object"]) or _takes(results["text"])) and (
        _takes(results["nine object"]) or _takes(results["nine text"])
    )
    null_content = not (shows("object", "probe_v") or shows("text", "probe_v")) and (
        shows("null object", "probe_v") or shows("null text", "probe_v")
    )
    prefix = "nine " if nine_letters else "null " if null_content else ""
    return TemplateForm(
        several_systems=shows("systems", "probe_s", "probe_t"),
        late_system=shows("late", "probe_s", "probe_t"),
        any_system=shows("system", "probe_s") or not shows("plain", "probe_u"),
        same_role_twice=shows("twice", "probe_u", "probe_w") or not shows("plain", "probe_u"),
        arguments_as_text=_wants_text(results[f"{prefix}object"], results[f"{prefix}text"]),
        nine_letters=nine_letters,
        null_content=null_content,
        results=not shows("plain", "probe_u") or any(map(shows, _CALLS, ["probe_r"] * len(_CALLS))),
    )


_CALLS = ("object", "text", "nine object", "nine text", "null object", "null text")


def _takes(text: str | TemplateFailure) -> bool:
    return isinstance(text, str)


def _wants_text(of_object: str | TemplateFailure, of_text: str | TemplateFailure) -> bool:
    """Return whether arguments must be text: where objects fail, come as Python writes them, or not at all."""
    if isinstance(of_text, TemplateFailure) or "probe_v" not in of_text:
        return False
    if isinstance(of_object, TemplateFailure):
        return True
    return "{'probe_k'" in of_object or "probe_v" not in of_object


# Shaping.


def _normal(message: Mapping[str, Any]) -> Message:
    """Return a message with text for its content and objects for arguments."""
    result = {name: value for name, value in message.items() if value is not None}
    result["role"] = "system" if message.get("role") == "developer" else message.get("role")
    result["content"] = _content(message)
    calls = result.pop("tool_calls", None)
    if calls:
        result["tool_calls"] = [_normal_call(call) for call in calls]
    return result


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list | tuple):
        parts = [part.get("text", part.get("refusal")) if isinstance(part, Mapping) else part for part in content]
        return "".join(part for part in parts if isinstance(part, str))
    if content is None:
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)


def _with_reasoning(tokenizer: Any, message: Message) -> Message:
    """Take apart an answer that came with its thinking in the content, as servers without a field for it send them."""
    if message["role"] != "assistant" or has_reasoning(message):
        return message
    found = split_thinking(tokenizer, message["content"], has_calls="tool_calls" in message)
    return message if found is None else {**message, "reasoning_content": found[0], "content": found[1]}


def _normal_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return {
        "id": call.get("id"),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": read_arguments(function.get("arguments"))},
    }


def _with_ids(messages: list[Message], style: str) -> list[Message]:
    """Give calls and their results ids: those that there are, in the template's form where it demands one."""
    renamed: dict[str, str] = {}
    waiting: list[str] = []
    count = 0
    result = []
    for message in messages:
        if calls := message.get("tool_calls"):
            named, waiting = [], []
            for call in calls:
                own = call["id"] if isinstance(call["id"], str) and call["id"] else f"call_{count}"
                given = _id(own, call["function"]["name"], count, style)
                renamed[own] = given
                waiting.append(given)
                named.append({**call, "id": given})
                count += 1
            message = {**message, "tool_calls": named}
        elif message["role"] == "tool":
            message = {**message, **_result_id(message, renamed, waiting, count, style)}
        result.append(message)
    return result


def _result_id(
    message: Message, renamed: Mapping[str, str], waiting: list[str], count: int, style: str
) -> dict[str, str]:
    """Return the id of a result's call; one that comes without is the next call's that waits for its result."""
    own = message.get("tool_call_id")
    if isinstance(own, str) and own in renamed:
        given = renamed[own]
    elif waiting:
        given = waiting[0]
    elif isinstance(own, str):
        given = _id(own, message.get("name"), count, style)
    else:
        return {}
    if given in waiting:
        waiting.remove(given)
    return {"tool_call_id": given}


def _id(own: str, name: Any, count: int, style: str) -> str:
    if style == "nine":
        return own if NINE_LETTERS.fullmatch(own) else nine_letters(own)
    if style == "kimi" and not _KIMI.fullmatch(own):
        return f"functions.{name}:{count}"
    return own


def nine_letters(text: str) -> str:
    """Return nine letters and digits that follow from a text."""
    number = int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest())
    letters = []
    for _ in range(9):
        number, letter = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)


def _with_systems(messages: list[Message], form: TemplateForm) -> list[Message]:
    """Put system messages where the template takes them."""
    leading = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    late = [m for m in messages[leading:] if m["role"] == "system"]
    moved = bool(late) and not form.late_system
    systems = messages[:leading] + (late if moved else [])
    rest = [m for m in messages[leading:] if not (moved and m["role"] == "system")]
    if not systems:
        return rest
    if len(systems) > 1 and (not form.several_systems or not form.any_system):
        text = "\n\n".join(m["content"] for m in systems if m["content"])
        systems = [{**systems[0], "content": text}]
    if form.any_system:
        return [*systems, *rest]
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if first is None:
        return [_user(systems[0]["content"]), *rest]
    joined = "\n\n".join(filter(None, (systems[0]["content"], rest[first]["content"])))
    return [*rest[:first], {**rest[first], "content": joined}, *rest[first + 1 :]]


def _merged(messages: list[Message]) -> list[Message]:
    """Join neighbours of one role, for templates that want user and assistant by turns."""
    result: list[Message] = []
    for message in messages:
        last = result[-1] if result else None
        if last and last["role"] == message["role"] in ("user", "assistant") and not last.get("tool_calls"):
            content = "\n\n".join(filter(None, (last["content"], message["content"])))
            result[-1] = {**last, **message, "content": content}
        else:
            if last and last["role"] == "tool" and message["role"] == "user":  # nobody said anything of the result
                result.append({"role": "assistant", "content": ""})
            result.append(message)
    return result


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _with_null_contents(messages: list[Message]) -> list[Message]:
    """Give calls messages of their own, with a content that is null."""
    result: list[Message] = []
    for message in messages:
        if not message.get("tool_calls"):
            result.append(message)
            continue
        if message["content"]:
            result.append({name: value for name, value in message.items() if name != "tool_calls"})
        result.append({**message, "content": NULL})
    return result


def _as_words(message: Message) -> Message:
    """Return a call, or the result of one, as an ordinary message: for models that know no tools."""
    if calls := message.get("tool_calls"):
        told = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**rest, "content": "\n".join(filter(None, (message["content"], *told)))}
    return _user(message["content"]) if message["role"] == "tool" else message


def _without_nulls(value: Any) -> Any:
    """Leave out null descriptions and the like of a tool; null among values that may be given stays."""
    if isinstance(value, Mapping):
        kept = {}
        for name, item in value.items():
            if item is None and name in ("description", "parameters", "strict", "title", "type", "properties"):
                continue
            kept[name] = item if name in ("enum", "const", "default", "examples") else _without_nulls(item)
        return kept
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value

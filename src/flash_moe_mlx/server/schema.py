"""Validation of request bodies: from untrusted JSON to a checked `GenerationRequest`.

Fields of OpenAI's API that would change the answer but are not supported are refused. Unknown fields are ignored, as
other servers do, because clients send many.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..chat.prompt import OWN_VARIABLES
from ..runtime.grammar import Grammar
from .api_error import ApiError
from .fields import as_optional_object
from .messages import check_messages, check_tools
from .structured import parse_grammar

MAX_STOPS = 1000
MAX_STOP_CHARACTERS = 1000
MAX_TOP_LOGPROBS = 20
MIN_REPETITION_PENALTY = 0.01
"""Lowest nonzero temperature: dividing logits by less could make them infinite."""
MAX_LOGIT_BIASES = 1024
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions. A chat answer may use the rest of the context."""

_INT64 = 2**63
_REFUSED = {
    "functions": "Use tools.", "function_call": "Use tool_choice.", "audio": "Leave it out.", "suffix": "Leave it out.",
    "prompt_logprobs": "Leave it out.",
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Temperature 0 is greedy; `repetition_penalty` 1 and 0 for the others have no effect."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One validated request.

    Attributes:
        messages: Messages in the form that chat templates take; None for a plain completion.
        prompt: Text or token ids of a plain completion.
        tools: Tools for the prompt, unchanged.
        call_required: Whether the answer must begin with a tool call.
        parallel_tool_calls: Whether more than one call may be made.
        grammar: Grammar that the answer's text obeys; None leaves it free.
        template_arguments: Variables of the chat template, such as whether and how hard to think.
        thinking_budget: Maximum number of tokens of thinking; None is no limit.
        progress: Whether a stream says how much of the prompt was read.
        echo: Fields of the request that the answer repeats or keeps, for formats that have such.
        max_tokens: Maximum number of tokens to generate; None is what the context has room for.
        stop: Strings that end the answer and are not part of it.
        top_logprobs: Number of alternatives per token; None sends no log-probabilities.
        stream: Whether to send the answer in parts.
        include_usage: Whether to send the usage at the end of a stream.
    """

    messages: list[dict[str, Any]] | None
    prompt: str | list[int]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    top_logprobs: int | None
    stream: bool
    include_usage: bool
    tools: list[dict[str, Any]] | None = None
    call_required: bool = False
    parallel_tool_calls: bool = True
    grammar: Grammar | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    thinking_budget: int | None = None
    progress: bool = False
    echo: Mapping[str, Any] = field(default_factory=dict)


def parse_chat(body: Any, model_id: str, vocabulary: int, defaults: Sampling) -> GenerationRequest:
    """Parse the body of /v1/chat/completions.

    Raises:
        ApiError: 400, naming the invalid field; 404 for a model other than ``model_id``.
    """
    common = _parse_common(body, model_id, vocabulary, defaults)
    messages = check_messages(body.get("messages"))
    tools = check_tools(body.get("tools"))
    choice = body.get("tool_choice") or None
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        tools = [tool for tool in tools or [] if tool["function"]["name"] == name]
        choice = "required"
    if choice not in (None, "none", "auto", "required") or (choice == "required" and not tools):
        raise _wrong("tool_choice", 'be "none", "auto", "required" or name one of the tools', body.get("tool_choice"))
    alternatives = _integer(body, "top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    wanted = _boolean(body, "logprobs", False)
    if alternatives and not wanted:
        raise _wrong("top_logprobs", "come with logprobs: true", alternatives)
    most = _limit(body, "max_completion_tokens")
    return replace(
        common,
        messages=messages,
        tools=None if choice == "none" else tools or None,
        call_required=choice == "required",
        parallel_tool_calls=_boolean(body, "parallel_tool_calls", True),
        template_arguments=_template_arguments(body),
        max_tokens=common.max_tokens if most is None else most,
        top_logprobs=(alternatives or 0) if wanted else None,
    )


def _template_arguments(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat template's variables: ``chat_template_kwargs``, and those that clients send at the top level.

    Templates ignore what they don't know.
    """
    given = dict(as_optional_object(body.get("chat_template_kwargs"), "chat_template_kwargs"))
    if ours := sorted(set(given) & OWN_VARIABLES):
        raise _wrong("chat_template_kwargs", f"leave out {', '.join(sorted(OWN_VARIABLES))}", ours)
    for name in ("enable_thinking", "preserve_thinking"):
        if (value := _boolean(body, name, None)) is not None:
            given.setdefault(name, value)
    effort = _text(body, "reasoning_effort", "")
    if effort:
        given.setdefault("reasoning_effort", effort)
    if effort == "none":
        given.setdefault("enable_thinking", False)
    return given


def parse_completion(body: Any, model_id: str, vocabulary: int, defaults: Sampling) -> GenerationRequest:
    """Parse the body of /v1/completions; raises the errors of :func:`parse_chat`."""
    common = _parse_common(body, model_id, vocabulary, defaults)
    if _boolean(body, "echo", False):
        raise _wrong("echo", "be false", True)
    if _integer(body, "best_of", 1, 1, 128) != 1:
        raise _wrong("best_of", "be 1", body["best_of"])
    return replace(
        common,
        prompt=_prompt(body.get("prompt"), vocabulary),
        max_tokens=COMPLETION_MAX_TOKENS if body.get("max_tokens") is None else common.max_tokens,
        top_logprobs=_integer(body, "logprobs", None, 0, MAX_TOP_LOGPROBS),
    )


def _parse_common(body: Any, model_id: str, vocabulary: int, defaults: Sampling) -> GenerationRequest:
    if not isinstance(body, Mapping):
        raise ApiError(400, f"the body must be a JSON object, got {_shown(body)}. See docs/server.md.")
    model = _text(body, "model", model_id) or model_id
    if model != model_id:
        raise ApiError(
            404,
            f"model must be {model_id!r}, got {_shown(model)}. See /v1/models.",
            param="model",
            code="model_not_found",
        )
    for name, advice in _REFUSED.items():
        if body.get(name) not in (None, [], {}, "", "none", "auto", False):  # values that request nothing
            raise ApiError(400, f"{name} is not supported. {advice}", param=name, code="unsupported_parameter")
    if _integer(body, "n", 1, 1, 128) != 1:
        raise _wrong("n", "be 1", body["n"])
    stream = _boolean(body, "stream", False)
    stream_options = as_optional_object(body.get("stream_options"), "stream_options")
    return GenerationRequest(
        messages=None,
        prompt="",
        sampling=_sampling(body, vocabulary, defaults),
        max_tokens=_limit(body, "max_tokens"),
        stop=_stop(body.get("stop")),
        top_logprobs=None,
        stream=stream,
        grammar=parse_grammar(body),
        include_usage=_boolean(stream_options, "include_usage", False),
        progress=stream and bool(_boolean(body, "return_progress", False)),
    )


def _sampling(body: Mapping[str, Any], vocabulary: int, defaults: Sampling) -> Sampling:
    result = Sampling(
        temperature=_number(body, "temperature", defaults.temperature, 0, 2),
        top_p=_number(body, "top_p", defaults.top_p, 0, 1),
        top_k=max(0, _integer(body, "top_k", defaults.top_k, -1, _INT64)),
        min_p=_number(body, "min_p", defaults.min_p, 0, 1),
        seed=_seed(body, defaults.seed),
        repetition_penalty=_number(body, "repetition_penalty", defaults.repetition_penalty, MIN_REPETITION_PENALTY, 10),
        presence_penalty=_number(body, "presence_penalty", defaults.presence_penalty, -2, 2),
        frequency_penalty=_number(body, "frequency_penalty", defaults.frequency_penalty, -2, 2),
        logit_bias=_logit_bias(as_optional_object(body.get("logit_bias"), "logit_bias"), vocabulary),
    )
    if result.top_p == 0:
        raise _wrong("top_p", "be above 0", 0)
    return result


def _seed(body: Mapping[str, Any], default: int | None) -> int | None:
    """Return the seed, or None for any, which local clients write as -1."""
    seed = _integer(body, "seed", default, -_INT64, _INT64)
    return None if seed == -1 else seed


def _logit_bias(biases: Mapping[str, Any], vocabulary: int) -> dict[int, float] | None:
    if len(biases) > MAX_LOGIT_BIASES:
        raise _wrong("logit_bias", f"have at most {MAX_LOGIT_BIASES} entries", len(biases))
    result = {}
    for token in biases:
        # For any other number MLX would write out of bounds.
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocabulary):
            raise _wrong("logit_bias", f"have token ids from 0 to {vocabulary - 1} as keys", token)
        result[int(token)] = _number(biases, token, 0.0, -100, 100, "logit_bias")
    return result or None


def _limit(body: Mapping[str, Any], name: str) -> int | None:
    """Return a number of tokens, or None for no limit, which local clients write as -1."""
    most = _integer(body, name, None, -1, _INT64)
    if most == 0:
        raise _wrong(name, "be a whole number from 1, or -1 for no limit", 0)
    return None if most == -1 else most


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) for s in stops):
        raise _wrong("stop", f"be a text or up to {MAX_STOPS:,} texts", value)
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise _wrong("stop", f"have texts of at most {MAX_STOP_CHARACTERS} characters", value)
    return tuple(dict.fromkeys(filter(None, stops)))


def _prompt(value: Any, vocabulary: int) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token < vocabulary for token in value):
        return value
    if not isinstance(value, str) or not value:
        raise _wrong("prompt", f"be one text, or token ids from 0 to {vocabulary - 1}", value)
    return value


def _text(body: Mapping[str, Any], name: str, default: str) -> str:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(name, "be a text", value)
    return default if value is None else value


def _boolean(body: Mapping[str, Any], name: str, default: Any) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "be true or false", value)
    return default if value is None else value


def _integer(body: Mapping[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value < high + 1:
        raise _wrong(name, f"be a whole number from {low} to {high}", value)
    return value


def _number(
    body: Mapping[str, Any], name: str, default: float, low: float, high: float, param: str | None = None
) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high or math.isnan(value):
        raise _wrong(param or name, f"be a number from {low} to {high}", value)
    return float(value)


def _wrong(name: str, must: str, got: Any) -> ApiError:
    return ApiError(400, f"{name} must {must}, got {_shown(got)}.", param=name)


def _shown(value: Any) -> str:
    text = _BRIEF.repr(value)  # abbreviated: the value may be megabytes long and deeply nested
    return text if len(text) <= 80 else f"{text[:77]}..."


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 80

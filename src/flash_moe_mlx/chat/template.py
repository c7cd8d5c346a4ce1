"""Render chat templates within bounded time and memory, whatever they hold.

A template is a program that comes with a checkpoint. It runs in a process of its own, which is ended when it takes too
long, so that nothing a template does hangs or kills this one.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError

NULL = object()
"""Content that a template shall see as null; content that is None is left out."""

RENDER_SECONDS = 10.0
"""Longest time of one request to the process; a conversation of 100,000 tokens takes milliseconds."""

_SCRIPT = Path(__file__).with_name("template_process.py")
_CHUNK = 1 << 16
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Exceptions of templates that meet messages of an unexpected form.
_RAISED = (
    TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


class TemplateFailure(Exception):
    """A template's exception, or the reason why it was ended; its text goes into the RequestError."""


class _Process:
    """The process that renders; started when it is needed, and again after one that had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def request(self, template: str, variables: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Render each set of variables: ``{"text": ...}`` or ``{"error": ...}``."""
        line = json.dumps({"template": template, "variables": variables}, default=_placeholder).encode() + b"\n"
        with self._lock:
            child = self._started()
            answered = False
            try:
                reply = self._exchange(child, line)
                answered = len(reply) == len(variables)
            except BrokenPipeError:
                reply = []
            finally:  # after an interrupt, too: what it may still say answers nothing that will be asked
                if not answered:
                    self._end()
        if not reply:
            raise TemplateFailure("the end of its process: it takes too much memory")
        return reply if answered else [reply[0]] * len(variables)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._owner != os.getpid():  # a forked process has its own
            command = [sys.executable, "-P", str(_SCRIPT), *filter(None, sys.path)]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
            self._owner = os.getpid()
        return self._child

    def _exchange(self, child: "subprocess.Popen[bytes]", line: bytes) -> list[dict[str, str]]:
        assert child.stdin is not None
        assert child.stdout is not None
        deadline = time.monotonic() + RENDER_SECONDS
        left = memoryview(line)
        while left:
            left = left[child.stdin.write(left[:_CHUNK]) or 0 :]
        received = bytearray()
        poller = select.poll()  # select() itself knows no descriptor from 1,024
        poller.register(child.stdout, select.POLLIN)
        while not received.endswith(b"\n"):
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TemplateFailure(f"no end within {RENDER_SECONDS:g} seconds")
            if not (data := child.stdout.read(_CHUNK)):
                break
            received += data
        return json.loads(received) if received else []

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


_process = _Process()
atexit.register(_process.close)


def render_templates(
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    generate: Sequence[bool],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **arguments: Any,
) -> list[str | TemplateFailure]:
    """Render conversations by a tokenizer's chat template, as its ``apply_chat_template(tokenize=False)`` does.

    Args:
        tokenizer: From :func:`flash_moe_mlx.load`; has a chat template.
        conversations: Messages of each conversation.
        generate: Whether to add what makes the model answer, for each conversation.
        tools: Tools, in the form that templates take.
        **arguments: Further variables of the template.

    Returns:
        For each conversation its text, or what the template raised.

    Raises:
        RequestError: If the template has no end within the time or memory that it is given.
    """
    arguments = _with_thinking(tokenizer, arguments)
    hub = getattr(tokenizer, "_tokenizer", tokenizer)
    plain = [[_plain(message) for message in messages] for messages in conversations]
    if getattr(tokenizer, "_chat_template", None) is not None or _renders_itself(hub):
        options = arguments | ({"tools": tools} if tools else {})
        return [
            _call(tokenizer, messages, add_generation_prompt=wanted, **options)
            for messages, wanted in zip(plain, generate, strict=True)
        ]
    common = {"tools": tools, "documents": None, **hub.special_tokens_map, **arguments}
    variables = [
        {"messages": messages, "add_generation_prompt": wanted, **common}
        for messages, wanted in zip(plain, generate, strict=True)
    ]
    try:
        results = _process.request(hub.get_chat_template(None, tools), variables)
    # JSON's own: messages that are nested too deeply, that hold themselves, or whose keys are no text.
    except (RecursionError, ValueError, TypeError) as error:
        return [TemplateFailure(f"messages that are no JSON ({type(error).__name__})")] * len(variables)
    except TemplateFailure as failure:
        raise RequestError(
            f"[messages] the chat template must finish, got {failure}. Use another template, or fewer messages."
        ) from failure
    return [result["text"] if "text" in result else TemplateFailure(result["error"]) for result in results]


def refused(failure: TemplateFailure) -> RequestError:
    """Say that a template does not take the messages."""
    told = str(failure).strip().rstrip(".")
    return RequestError(f"[messages] must suit the chat template, got {told}. Check roles and their order.")


def _with_thinking(tokenizer: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Add mlx_lm's default of the variable that asks for thinking, under the name that the tokenizer has for it."""
    name = getattr(tokenizer, "_thinking_kwarg", "enable_thinking")
    result = dict(arguments)
    if name != "enable_thinking" and "enable_thinking" in result:
        result[name] = result.pop("enable_thinking")
    return {name: bool(getattr(tokenizer, "has_thinking", False)), **result}


def _renders_itself(tokenizer: Any) -> bool:
    return getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template


def _call(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str | TemplateFailure:
    """Render by Python code that came with the tokenizer or with mlx_lm, which the user has chosen to run."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except _RAISED as error:
        return TemplateFailure(f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else error)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is null, and give reasoning under both names that templates have for it, as transformers does."""
    result = {name: value for name, value in message.items() if value is not None}
    if result.get("content") is NULL:
        result["content"] = None
    reasoning = next((result[name] for name in _REASONING if name in result), None)
    return result if reasoning is None else {"thinking": reasoning, **result, "reasoning_content": reasoning}


def _placeholder(value: Any) -> str:
    return f"<{type(value).__name__}>"

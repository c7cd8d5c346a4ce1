"""Render chat templates in a process of its own: a script that imports nothing of the package.

A template comes with a checkpoint, so nobody has read it: it may loop for ever, or ask for a terabyte. Here it can be
stopped at any moment, and what it takes is not the server's memory.

Reads requests from standard input and writes replies to standard output, one JSON object a line. The environment is
that of transformers' ``apply_chat_template``, so that the text is the same.
"""

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

sys.path[:] = [*sys.path, *(entry for entry in sys.argv[1:] if entry not in sys.path)]

from jinja2 import TemplateError, nodes  # noqa: E402 - found on the parent's path
from jinja2.exceptions import SecurityError  # noqa: E402
from jinja2.ext import Extension, loopcontrols  # noqa: E402
from jinja2.parser import Parser  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402
from jinja2.utils import Namespace  # noqa: E402

MEMORY_BYTES = 384 << 20  # address space, where the system keeps to it: macOS doesn't
MAX_LENGTH = 1 << 24  # characters of a text, items of a list
MAX_POWER_BITS = 1 << 16


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, in which products and powers that would take the machine are refused."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or a power."""
        if operator == "**":
            bits = left.bit_length() if isinstance(left, int) else 0
            if isinstance(right, int) and bits * right > MAX_POWER_BITS:
                raise TemplateError("a power of the template is too large")
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int):
                if isinstance(value, str | list | tuple) and len(value) * times > MAX_LENGTH:
                    raise TemplateError("a product of the template is too large")
                if isinstance(value, int) and value.bit_length() + times.bit_length() > MAX_POWER_BITS:
                    raise TemplateError("a product of the template is too large")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """The tag that marks an assistant's words for training; here its body stands as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class SafeNamespace(Namespace):
    """A namespace without names that lead to Python's insides."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace must not have {name!r}")
        super().__setitem__(name, value)


def namespace(*args: Any, **kwargs: Any) -> SafeNamespace:
    """Make a namespace, as templates do."""
    result = SafeNamespace()
    for name, value in dict(*args, **kwargs).items():
        result[name] = value
    return result


def raise_exception(message: Any) -> None:
    """Raise what a template has to say."""
    raise TemplateError(str(message))


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Render JSON without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def compiled(source: str) -> Any:
    """Compile a template."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = namespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any]) -> dict[str, str]:
    """Render one conversation: its text, or what the template raised."""
    try:
        text = compiled(source).render(**variables)
        if len(text) > MAX_LENGTH:
            return {"error": f"a text of {len(text)} characters"}
        return {"text": text}
    # Whatever else there may be ends the process, which reports it too.
    except (
        TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, OSError,
        RuntimeError, SyntaxError, TypeError, ValueError,
    ) as error:  # fmt: skip
        return {"error": told(error)}


def told(error: BaseException) -> str:
    """Say what was raised; a template's own words stand alone."""
    words = str(error)[:2000]
    return words if words and isinstance(error, TemplateError) else f"{type(error).__name__}: {words}"


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def reply(results: list[dict[str, str]]) -> None:
        replies.write(json.dumps(results) + "\n")
        replies.flush()

    sys.excepthook = lambda kind, error, trace: reply([{"error": told(error)}])
    for line in sys.stdin:
        request = json.loads(line)
        reply([render(request["template"], variables) for variables in request["variables"]])


if __name__ == "__main__":
    main()

"""Words errors as the command line does: its options instead of the library's arguments and the parser's types."""

import re
from typing import Any

_NAMES = (
    "activation_bits", "adapter_path", "api_key", "chat_template_args", "disk_rate", "gpu_memory_limit", "kv_bits",
    "kv_group_size", "layer_bits", "link_us", "max_body", "max_bytes", "max_concurrent", "max_context", "max_queue",
    "max_tokens", "memory_limit", "num_experts_per_tok", "prefix_cache", "prefix_dir", "prefix_dir_size",
    "thinking_budget", "trust_remote_code",
)  # fmt: skip
"""Arguments of the library that are options too."""

_OTHER_NAMES = {"layer_bits": "layers", "max_bytes": "prefix_cache"}

_ARGUMENT = re.compile(rf"""(?<![\w/."'-])({"|".join(_NAMES)})\b(?![/"']|\.\w)(?: ?= ?"?([\w.]*\w)"?)?""")
_BOUNDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
    "less than": "less than",
}


def as_options(message: str) -> str:
    """Return an error message with the library's arguments written as the command line's options."""

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        name = _OTHER_NAMES.get(name, name)
        return f"--{name.replace('_', '-')}" + (f" {value}" if value and value != "True" else "")

    return _ARGUMENT.sub(option, message).replace("with model.streaming.trace", "with flash-moe trace")


def usage(error: Any) -> str:
    """Return a sentence about wrong usage, with the value that was given, and without what the parser's layers add.

    Args:
        error: The parser's exception; its cause, if any, is pydantic's.
    """
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    message = re.sub(
        r"Input should be a valid (\w+), unable to parse string as an? \w+", r"must be of type \1", message
    )
    message = re.sub(rf"Input should be ({'|'.join(_BOUNDS)})", lambda found: f"must be {_BOUNDS[found[1]]}", message)
    refused: list[Any] = getattr(error.__cause__, "errors", list)()
    if refused and "input" in refused[0] and "must be " in message:
        message = f"{message}, got {refused[0]['input']!r}"
    return message if message.endswith("?") else f"{message}."

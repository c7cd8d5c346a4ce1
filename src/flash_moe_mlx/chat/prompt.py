"""Prompts of chats: from messages to tokens, and the points in them that later prompts are likely to share."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import RequestError
from ..runtime.prefix_cache import common_prefix
from ..runtime.prompt_text import PromptTooLongError, check_length, check_text
from .dialect import template_of
from .marked import encode, mark
from .shaping import shape_messages, shape_tools, with_descriptions
from .template import TemplateFailure, refused, render_templates

logger = logging.getLogger(__name__)

OWN_VARIABLES = frozenset((
    "tokenizer", "max_context", "messages", "conversation", "tools", "documents", "chat_template",
    "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors",
    "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs",
    "sanitize_control_tokens",
))  # fmt: skip
"""Variables of templates, and options of ``apply_chat_template``, that are not for a caller to give."""

_PROBE = "\u2063"  # an invisible separator: no message begins with it


def chat_prompt(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, max_context: int | None = None, **template_arguments: Any
) -> tuple[list[int], list[int]]:
    """Return a conversation's prompt, and the points in it that later prompts are likely to share.

    These are the end of the system prompt (with the tools), the end of what comes before the last message of the user,
    and the end of the last message, before what the template adds to make the model answer: templates drop the
    thinking of earlier turns, so what follows that point is often another text in the next prompt. A point is where
    the prompt and a shorter conversation begin to differ, so it is right for a template that changes earlier turns.

    Args:
        tokenizer: From :func:`flash_moe_mlx.load`; must have a chat template.
        messages: As OpenAI's API has them. They are brought to the form that the template takes.
        max_context: Tokens that there is room for; a prompt that has more is refused, a very long one before it is
            tokenised. None is no bound.
        **template_arguments: Passed to it, such as ``tools``.

    Returns:
        Token ids, and positions in them, ascending: for ``snapshot_at``.

    Raises:
        RequestError: If the template can't render the messages, or has no end within bounded time and memory; if the
            prompt is longer than ``max_context``.
    """
    ours = OWN_VARIABLES - {"tools"}
    options = {name: value for name, value in template_arguments.items() if name not in ours}
    template = template_of(tokenizer)
    if "enable_thinking" in options and "enable_thinking" not in template and "thinking" in template:
        options.setdefault("thinking", options["enable_thinking"])  # DeepSeek's name for it
    tools = shape_tools(options.pop("tools", None))
    system = [m for m in messages[:1] if m.get("role") in ("system", "developer")]
    users = [i for i, m in enumerate(messages) if m.get("role") == "user"]
    shorter = [list(messages)]
    if len(messages) > len(system):
        shorter.append([*system, {"role": "user", "content": _PROBE}])
    if users and users[-1] > len(system):
        shorter.append(list(messages[: users[-1]]))
    try:
        shaped = [mark(tokenizer, shape_messages(tokenizer, part)) for part in (messages, *shorter)]
    except RecursionError as error:
        raise RequestError("[messages] must be nested less deeply, got more levels than Python supports.") from error
    generate = [True, *[False] * len(shorter)]
    text, *others = render_templates(tokenizer, shaped, generate=generate, tools=mark(tokenizer, tools), **options)
    if isinstance(text, TemplateFailure) and tools and (described := with_descriptions(tools)) != tools:
        # Some templates join a description to other text, whether there is one or not.
        described = mark(tokenizer, described)
        text, *others = render_templates(tokenizer, shaped, generate=generate, tools=described, **options)
    if isinstance(text, TemplateFailure):
        raise refused(text)
    if max_context is not None:
        check_length(tokenizer, text, max_context)
    tokens = _encode(tokenizer, text)
    if max_context is not None and len(tokens) > max_context:
        raise PromptTooLongError(
            f"[prompt] must leave the context at most max_context = {max_context} tokens, got {len(tokens)}. Shorten "
            "it, or load with a larger max_context."
        )
    points = set()
    for part, other in zip(shorter, others, strict=True):
        if isinstance(other, TemplateFailure):
            logger.debug("the chat template does not take the first %d messages alone", len(part))
        else:
            points.add(common_prefix(np.array(tokens), np.array(_encode(tokenizer, other))))
    return tokens, sorted(points)


def _encode(tokenizer: Any, text: str) -> list[int]:
    check_text(text, "messages")
    return encode(tokenizer, text)

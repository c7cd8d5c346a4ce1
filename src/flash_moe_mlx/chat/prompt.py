"""Prompts of chats: from messages to tokens, and the points in them that later prompts are likely to share."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..runtime.prefix_cache import common_prefix
from ..runtime.prompt_text import PromptTooLongError, check_length, check_text
from .template import TemplateFailure, refused, render_templates

logger = logging.getLogger(__name__)

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
        messages: As ``tokenizer.apply_chat_template`` takes them.
        max_context: Tokens that there is room for; a prompt that has more is refused, a very long one before it is
            tokenised. None is no bound.
        **template_arguments: Passed to it, such as ``tools``.

    Returns:
        Token ids, and positions in them, ascending: for ``snapshot_at``.

    Raises:
        RequestError: If the template can't render the messages, or has no end within bounded time and memory; if the
            prompt is longer than ``max_context``.
    """
    options = {name: value for name, value in template_arguments.items() if name not in _OURS}
    system = [m for m in messages[:1] if m["role"] == "system"]
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    shorter = [list(messages)]
    if len(messages) > len(system):
        shorter.append([*system, {"role": "user", "content": _PROBE}])
    if users and users[-1] > len(system):
        shorter.append(list(messages[: users[-1]]))
    generate = [True, *[False] * len(shorter)]
    text, *others = render_templates(tokenizer, [messages, *shorter], generate=generate, **options)
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


_OURS = frozenset(("add_generation_prompt", "tokenize", "return_dict"))
"""Options of ``apply_chat_template`` that are no variables of the template."""


def _encode(tokenizer: Any, text: str) -> list[int]:
    check_text(text, "messages")
    return list(tokenizer.encode(text, add_special_tokens=False))

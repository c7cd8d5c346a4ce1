"""The end of a prompt's effect on the thinking of the answer: whether a template has opened or closed it there."""

from collections.abc import Sequence
from typing import Any, Literal

_TAIL = 16  # tokens of the generation prompt in which a template opens or closes the thinking


def thinking_at_end(tokenizer: Any, prompt: Sequence[int]) -> Literal["open", "closed", "none"]:
    """Return whether the end of the prompt opens or closes the thinking; markers in earlier messages count nothing.

    Args:
        tokenizer: The tokenizer that :func:`flash_moe_mlx.load` returned.
        prompt: The prompt's tokens.
    """
    if not tokenizer.has_thinking or not len(prompt):
        return "none"
    tail = list(prompt[-_TAIL:])
    ended = set(getattr(tokenizer, "eos_token_ids", ()))  # the end of somebody's turn
    tail = tail[max((i + 1 for i, token in enumerate(tail) if token in ended), default=0) :]
    start, end = tokenizer.rfind_think_start(tail), tokenizer.rfind_think_end(tail)
    return "open" if start > end else "closed" if end >= 0 else "none"

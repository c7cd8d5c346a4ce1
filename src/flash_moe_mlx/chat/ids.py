"""Ids of calls, in the form that the model's own template demands."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from .calls import Call
from .shaping import NINE_LETTERS, call_id_style, nine_letters


class CallIds:
    """Gives the calls of an answer their ids: the model's own where it gave one that no other call has.

    Attributes:
        style: The form of the ids.
    """

    def __init__(self, style: str = "any", used: Sequence[str] = ()):
        """Begin an answer.

        Args:
            style: "nine" for nine letters and digits, "kimi" for ``functions.name:index``, "any" for whatever.
            used: Ids of the conversation's earlier calls.
        """
        self.style = style
        self._used = set(used)
        self._count = len(used)

    @classmethod
    def for_conversation(cls, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> "CallIds":
        """Return the ids of a conversation's next answer.

        Args:
            tokenizer: From :func:`flash_moe_mlx.load`; has a chat template.
            messages: The conversation so far.
        """
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        return cls(call_id_style(tokenizer), [str(call.get("id")) for call in calls])

    def of(self, call: Call) -> str:
        """Return a call's id."""
        given = call.id
        if given is None or given in self._used or (self.style == "nine" and not NINE_LETTERS.fullmatch(given)):
            given = self._new(call)
        self._used.add(given)
        self._count += 1
        return given

    def _new(self, call: Call) -> str:
        if self.style == "kimi":
            number = self._count
            while (given := f"functions.{call.name}:{number}") in self._used:
                number += 1
            return given
        given = uuid.uuid4().hex
        return nine_letters(given) if self.style == "nine" else f"call_{given[:24]}"

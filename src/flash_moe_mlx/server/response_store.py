"""ResponseStore: responses that clients ask for again, and conversations that they continue by a response's id."""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]


class _Kept(NamedTuple):
    messages: Messages
    response: Mapping[str, Any]
    nbytes: int


class ResponseStore:
    """Responses and the conversations they end, by id, the least recently used out when there are too many.

    Attributes:
        nbytes: Size of them all, as JSON.
    """

    def __init__(self, max_bytes: int = 16 << 20, max_responses: int = 256):
        """Begin empty.

        Args:
            max_bytes: Maximum size of all responses and conversations, as JSON.
            max_responses: Maximum number of responses.
        """
        self._max_bytes = max_bytes
        self._max_responses = max_responses
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()  # requests are read on a thread of their own
        self.nbytes = 0

    def put(self, response_id: str, messages: Messages, response: Mapping[str, Any]) -> None:
        """Keep a response, unless it is larger than the store.

        Args:
            response_id: Its id.
            messages: The conversation that it ends.
            response: The response, as it was sent.
        """
        nbytes = len(json.dumps([messages, response], ensure_ascii=False).encode(errors="replace"))
        if nbytes > self._max_bytes:
            return
        with self._lock:
            self._kept[response_id] = _Kept(messages, response, nbytes)
            self.nbytes += nbytes
            while self.nbytes > self._max_bytes or len(self._kept) > self._max_responses:
                _, dropped = self._kept.popitem(last=False)
                self.nbytes -= dropped.nbytes

    def get(self, response_id: str) -> Messages | None:
        """Return the messages of a conversation, or None where it is not kept."""
        kept = self._find(response_id)
        return None if kept is None else list(kept.messages)

    def response(self, response_id: str) -> Mapping[str, Any] | None:
        """Return a response, or None where it is not kept."""
        kept = self._find(response_id)
        return None if kept is None else kept.response

    def delete(self, response_id: str) -> bool:
        """Forget a response and its conversation; returns whether it was kept. Later responses keep their own."""
        with self._lock:
            kept = self._kept.pop(response_id, None)
            if kept is not None:
                self.nbytes -= kept.nbytes
        return kept is not None

    def _find(self, response_id: str) -> _Kept | None:
        with self._lock:
            if response_id in self._kept:
                self._kept.move_to_end(response_id)
            return self._kept.get(response_id)

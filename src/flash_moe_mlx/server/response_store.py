"""ResponseStore: conversations that clients continue by the id of a response."""

import json
import threading
from collections import OrderedDict
from typing import Any

Messages = list[dict[str, Any]]


class ResponseStore:
    """Conversations by the id of their last response, the least recently used out when there are too many.

    Attributes:
        nbytes: Size of the conversations, as JSON.
    """

    def __init__(self, max_bytes: int = 16 << 20, max_responses: int = 256):
        """Begin empty.

        Args:
            max_bytes: Maximum size of all conversations, as JSON.
            max_responses: Maximum number of conversations.
        """
        self._max_bytes = max_bytes
        self._max_responses = max_responses
        self._kept: OrderedDict[str, tuple[Messages, int]] = OrderedDict()
        self._lock = threading.Lock()  # requests are read on a thread of their own
        self.nbytes = 0

    def put(self, response_id: str, messages: Messages) -> None:
        """Keep a conversation; one that is larger than the store is not kept."""
        nbytes = len(json.dumps(messages, ensure_ascii=False).encode(errors="replace"))
        if nbytes > self._max_bytes:
            return
        with self._lock:
            self._kept[response_id] = messages, nbytes
            self.nbytes += nbytes
            while self.nbytes > self._max_bytes or len(self._kept) > self._max_responses:
                _, (_, dropped) = self._kept.popitem(last=False)
                self.nbytes -= dropped

    def get(self, response_id: str) -> Messages | None:
        """Return the messages of a conversation, or None where it is not kept."""
        with self._lock:
            if response_id not in self._kept:
                return None
            self._kept.move_to_end(response_id)
            return list(self._kept[response_id][0])

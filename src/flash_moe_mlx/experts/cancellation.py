"""Cancellation of forward passes by events, each of the thread that it was given on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Cancellation:
    """Events that end the forward passes of the current thread. May be nested: any of them ends a pass."""

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def by(self, cancelled: threading.Event) -> Iterator[None]:
        """Let an event cancel this thread's passes, besides those already given."""
        before = self._events
        self._local.events = (*before, cancelled)
        try:
            yield
        finally:
            self._local.events = before

    def is_set(self) -> bool:
        """Return whether any event of this thread is set."""
        return any(event.is_set() for event in self._events)

    @property
    def _events(self) -> tuple[threading.Event, ...]:
        events: tuple[threading.Event, ...] = getattr(self._local, "events", ())
        return events

"""Pace: chooses between two ways to decode several sequences, by how long each has taken. No MLX import."""

TRIAL = 2
"""Steps that are timed before a way is judged: the quickest of them counts."""

FIRST_RETRY = 16
"""Steps until the slower way is tried again; doubled each time it is still the slower one.

The first figures may be those of an engine without experts in memory.
"""

FAR = 2.0
"""Ratio from which passes together are so much slower that they are tried again only after `FAR_RETRY` steps."""

FAR_RETRY = 256

_NEW = 0.3


class _Average:
    """Seconds per step: the least of the first steps, then an average in which recent ones count more."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.seconds = float("inf")
        self.trials_left = TRIAL

    def add(self, seconds: float) -> None:
        if self.trials_left > 0:
            self.trials_left -= 1
            self.seconds = min(self.seconds, seconds)
        else:
            self.seconds += _NEW * (seconds - self.seconds)


class Pace:
    """Chooses whether sequences decode in one pass together or in turn.

    One pass reads weights and experts once for all. A model whose single tokens have a program of their own may be
    quicker in turn if it is small, because a pass of several is put together anew each time. In turn, a sequence takes
    as long in company as alone.
    """

    def __init__(self) -> None:
        self._in_turn = _Average()  # per sequence
        self._together: dict[int, _Average] = {}
        self._retry_after = self._until_retry = FIRST_RETRY
        self._chosen = False

    def together(self, size: int) -> bool:
        """Return whether the next step of ``size`` sequences should be one pass."""
        if self._in_turn.trials_left:
            return False
        known = self._together.get(size)
        if known is None:
            return self._least(size) < size * self._in_turn.seconds
        return known.trials_left > 0 or known.seconds <= size * self._in_turn.seconds

    def took(self, size: int, together: bool, seconds: float) -> None:
        """Note how long a step took; leave out those that had to merge caches or take them apart."""
        if together:
            self._together.setdefault(size, _Average()).add(seconds)
        else:
            self._in_turn.add(seconds / size)
        self._until_retry -= 1
        if self._until_retry <= 0 and size > 1:
            self._retry(size)

    def _retry(self, size: int) -> None:
        """Try the way again that is not in use."""
        chosen = self.together(size)
        self._retry_after = self._retry_after * 2 if chosen == self._chosen else FIRST_RETRY
        self._until_retry, self._chosen = self._retry_after, chosen
        if chosen:
            self._in_turn.begin()  # costs no more than one at a time does
            return
        known = self._together.get(size)
        seconds = self._least(size) if known is None else known.seconds
        if seconds < FAR * size * self._in_turn.seconds or self._retry_after > FAR_RETRY:
            self._together.setdefault(size, _Average()).begin()

    def _least(self, size: int) -> float:
        """Return a lower bound of a step's seconds from those of other sizes: more sequences don't take less."""
        return max(
            (a.seconds * min(1.0, size / other) for other, a in self._together.items() if not a.trials_left),
            default=0.0,
        )

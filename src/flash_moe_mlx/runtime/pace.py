"""Pace: chooses between two ways to decode several sequences, by how long each has taken. No MLX import."""

from statistics import fmean

GAIN = 0.95
"""Passes together are chosen if they take at most this share of the time of turns."""

HOPELESS = 2.0
"""A trial ends at the first pass that takes so many times the time of turns."""

TOKENS_TIMED = 4
"""Tokens in turn that are timed before and after a trial of passes together."""

PASSES_TIMED = 2

STEPS_KEPT = 32
"""Steps until a choice is questioned again, the cost of trials permitting."""

TRIAL_SHARE = 1 / 64
"""Share of the decoding time that trials of passes together may lose."""


class Pace:
    """Chooses whether sequences decode in one pass together or in turn.

    One pass reads weights and experts once for all. A model whose single tokens have a program of their own may be
    quicker in turn, because a pass of several is put together anew each time, and sequences that use different experts
    take them from each other. Turns cost what one sequence after the other costs, so they are the choice until passes
    together have been timed between two series of turns and were quicker than both: the first steps fill the slots, and
    get quicker whatever the way. Trials that lose time are made less often.
    """

    def __init__(self) -> None:
        self._chosen: dict[int, bool] = {}  # by the number of sequences: whether passes together are quicker
        self._credit = 0.0  # seconds that trials may lose; negative after one that did
        self._begin(0)

    def _begin(self, size: int) -> None:
        self._size = size  # number of sequences
        self._before = float("inf")  # seconds of a step in turn before the passes that are judged
        self._judged: float | None = None  # seconds of a pass, to be compared with the turns that follow
        self._trying = False  # whether passes are made to be timed only
        self._spent = self._worth = 0.0  # a trial's seconds, and the number of steps in turn that would do the same
        self._use(self._chosen.get(size, False))

    def _use(self, together: bool) -> None:
        self._together = together  # the way in use
        self._seconds: list[float] = []  # of the steps since the way changed; in turn, those of all sequences

    def together(self, size: int) -> bool:
        """Return whether the next step of ``size`` sequences should be one pass."""
        if size != self._size:
            self._begin(size)
        return self._together

    def took(self, size: int, together: bool, seconds: float, changed: bool = False) -> None:
        """Note how long a step took: a pass of ``size`` sequences, or the token of one of them.

        Args:
            size: Number of sequences.
            together: Whether it was a pass of all of them.
            seconds: Duration.
            changed: Whether caches were merged or taken apart, which belongs to a trial's cost but not to the pace.
        """
        if size != self._size or together != self._together:
            return
        step = seconds if together else seconds * size
        if self._trying and (together or changed):
            self._spent += seconds
            self._worth += 1 if together else 1 / size
        if together:
            self._passed(step, changed)
        else:
            self._credit = min(0.0, self._credit + TRIAL_SHARE * seconds)
            if not changed:
                self._took_turn(step)

    def _passed(self, step: float, changed: bool) -> None:
        if not changed:
            self._seconds.append(step)
        hopeless = self._trying and step > HOPELESS * self._before
        if hopeless or len(self._seconds) >= (PASSES_TIMED if self._trying else STEPS_KEPT):
            self._judged = step if hopeless else fmean(self._seconds[-PASSES_TIMED:])
            self._use(False)

    def _took_turn(self, step: float) -> None:
        self._seconds.append(step)
        known = self._judged is None and self._size in self._chosen
        if len(self._seconds) < (STEPS_KEPT if known else TOKENS_TIMED):
            return
        recent = fmean(self._seconds[-TOKENS_TIMED:])
        if self._judged is not None:
            in_turn = min(self._before, recent)
            self._chosen[self._size] = self._judged <= GAIN * in_turn
            if self._trying:
                self._credit -= max(0.0, self._spent - self._worth * in_turn)
            self._begin(self._size)
        elif self._credit >= 0:
            self._before, self._trying = recent, True
            self._use(True)

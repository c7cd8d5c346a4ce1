"""Which way several sequences are decoded, by made-up times."""

from collections.abc import Callable

import pytest

from flash_moe_mlx.runtime.pace import STEPS_KEPT, TRIAL_SHARE, Pace


class Clients:
    """Sequences whose tokens take made-up times.

    Attributes:
        seconds: Seconds so far.
        tokens: Tokens so far.
        passes: Number of passes together.
    """

    def __init__(self, together: Callable[[int], float], in_turn: Callable[[int], float]):
        """Start without tokens.

        Args:
            together: Seconds of a pass, by the number of tokens before it.
            in_turn: Seconds of one token, by the number of tokens before it.
        """
        self.pace = Pace()
        self.together, self.in_turn = together, in_turn
        self.seconds, self.tokens, self.passes = 0.0, 0, 0
        self._last = False

    def run(self, size: int, tokens: int, merging: float = 0.0) -> None:
        """Decode so many tokens; to change between the ways takes ``merging`` seconds."""
        until = self.tokens + tokens
        while self.tokens < until:
            together = self.pace.together(size)
            changed, self._last = together != self._last, together
            seconds = (self.together if together else self.in_turn)(self.tokens) + changed * merging
            self.pace.took(size, together, seconds, changed)
            self.seconds += seconds
            self.tokens += size if together else 1
            self.passes += together


def constant(seconds: float) -> Callable[[int], float]:
    return lambda tokens: seconds


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0, 1.3, 3.0, 20.0])
def test_never_slower_than_one_after_the_other(size: int, share: float):
    """Whatever a shared pass takes, and whatever merging costs, trials lose no more than their share."""
    clients = Clients(constant(share * size), constant(1.0))
    clients.run(size, 4000, merging=2.0)
    first = 4.0 + 3 * max(share - 1, 0) * size  # merging and taking apart again, and at most three passes
    assert clients.seconds < (1 + 1.1 * TRIAL_SHARE) * clients.tokens + 2 * first


def test_the_quicker_way_is_found_and_kept():
    clients = Clients(constant(2.0), constant(1.0))
    clients.run(4, 400)
    assert clients.passes * 4 > 0.8 * clients.tokens


def test_slots_that_fill_do_not_count_as_a_gain():
    """The first tokens read all their experts; passes that are tried later are quicker for that reason only."""
    clients = Clients(lambda tokens: 2.6 * (1 + 8 / (1 + tokens)), lambda tokens: 1 + 8 / (1 + tokens))
    clients.run(2, 60)
    assert clients.passes <= 6


def test_a_slow_pass_is_not_tried_again_for_every_number_of_sequences():
    clients = Clients(constant(80.0), constant(1.0))
    clients.run(8, 40)
    tried = clients.passes
    for size in (2, 4, 5, 7):
        clients.run(size, 100)
    assert clients.passes == tried > 0


def test_a_change_is_noticed():
    """When experts have to be read, say, one pass for all becomes the quicker way, and the other way round."""
    reading = False
    clients = Clients(lambda tokens: 3.0, lambda tokens: 3.0 if reading else 1.0)
    clients.run(2, 1000)
    before, reading = clients.passes, True
    clients.run(2, 1000)
    assert clients.passes > before + 400
    before, reading = clients.passes, False
    clients.run(2, 1000)
    assert clients.passes < before + 2 * STEPS_KEPT

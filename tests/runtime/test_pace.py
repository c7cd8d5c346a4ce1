"""Which way several sequences are decoded, by made-up times."""

from flash_moe_mlx.runtime.pace import FAR_RETRY, FIRST_RETRY, Pace


def run(pace: Pace, size: int, together: float, in_turn: float, steps: int) -> list[bool]:
    """Ways of the next steps, each of which takes so long."""
    ways = []
    for _ in range(steps):
        ways.append(pace.together(size))
        pace.took(size, ways[-1], together if ways[-1] else in_turn)
    return ways


def test_the_quicker_way_is_found_and_kept():
    assert sum(run(Pace(), 4, together=1.0, in_turn=2.0, steps=100)) > 85
    assert sum(run(Pace(), 4, together=2.0, in_turn=1.0, steps=100)) < 15


def test_a_slow_pass_is_not_tried_again_for_every_number_of_sequences():
    pace = Pace()
    run(pace, 8, together=8.0, in_turn=0.8, steps=FIRST_RETRY - 1)
    assert sum(sum(run(pace, size, together=8.0, in_turn=0.1 * size, steps=10)) for size in (2, 4, 5, 7)) < 5


def test_the_other_way_is_tried_again_less_and_less_often():
    pace = Pace()
    run(pace, 2, together=1.5, in_turn=1.0, steps=10)
    early = sum(run(pace, 2, together=1.5, in_turn=1.0, steps=20 * FIRST_RETRY))
    late = sum(run(pace, 2, together=1.5, in_turn=1.0, steps=20 * FIRST_RETRY))
    assert 0 < late < early < 15


def test_passes_that_are_far_slower_are_rarely_tried_again():
    pace = Pace()
    run(pace, 2, together=9.0, in_turn=1.0, steps=10)
    assert sum(run(pace, 2, together=9.0, in_turn=1.0, steps=200)) == 0
    assert 0 < sum(run(pace, 2, together=9.0, in_turn=1.0, steps=4 * FAR_RETRY)) < 10


def test_a_change_is_noticed():
    """When experts have to be read, say, one pass for all becomes the quicker way."""
    pace = Pace()
    run(pace, 2, together=2.0, in_turn=1.0, steps=10)
    run(pace, 2, together=1.0, in_turn=3.0, steps=2 * FIRST_RETRY)
    assert sum(run(pace, 2, together=1.0, in_turn=3.0, steps=100)) > 85

"""Division of a pass's positions into blocks, so that the logits of all of them need not be in memory at once."""

from itertools import pairwise

from ..ops.dequant_matvec import MAX_ROWS

MIN_BLOCK = 2 * MAX_ROWS + 1
"""Smallest size to divide into: halves of one more position are still products of more than MAX_ROWS rows. Products of
fewer have other bits."""


def blocks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Divide positions evenly into blocks; each is longer than MAX_ROWS if there are more positions than that.

    Args:
        start: First position.
        stop: Position after the last.
        size: Maximum number of positions in a block; at least MIN_BLOCK.

    Returns:
        First position and the position after the last of each block.
    """
    positions = stop - start
    count = max(1, -(-positions // max(size, MIN_BLOCK)))
    return list(pairwise(start + positions * part // count for part in range(count + 1)))


def block_positions(block_bytes: int, vocabulary_size: int) -> int:
    """Return how many positions' logits fit into a block, in float32."""
    return max(MIN_BLOCK, block_bytes // (4 * vocabulary_size))

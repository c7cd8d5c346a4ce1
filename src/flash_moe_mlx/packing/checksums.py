"""Combines the CRC-32s of pieces into the CRC-32 of the whole, without reading the data again."""

import zlib
from collections.abc import Iterable
from functools import cache

_POLYNOMIAL = 0xEDB88320  # zlib's polynomial, bits reversed


def combine(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two concatenated byte strings from their CRC-32s."""
    return _multiply(_power_of_x(8 * second_bytes), first) ^ second


def combine_segments(segments: Iterable[tuple[int, int, int]], nbytes: int) -> int:
    """Return the CRC-32 of ``nbytes`` bytes with ascending segments (offset, length, CRC-32) and zeros in between."""
    result = position = 0
    for offset, length, checksum in segments:
        result = combine(result, zeros(offset - position), offset - position)
        result = combine(result, checksum, length)
        position = offset + length
    return combine(result, zeros(nbytes - position), nbytes - position)


@cache
def zeros(nbytes: int) -> int:
    """Return the CRC-32 of ``nbytes`` zero bytes."""
    result = 0
    block = bytes(min(nbytes, 1 << 16))
    while nbytes > 0:
        result = zlib.crc32(block[:nbytes], result)
        nbytes -= len(block)
    return result


def _multiply(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2), modulo CRC-32's; the highest power is in the lowest bit."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result


@cache
def _power_of_x(exponent: int) -> int:
    """Return x to a power, modulo CRC-32's polynomial."""
    result, base = 1 << 31, 1 << 30  # 1, and x
    while exponent:
        if exponent & 1:
            result = _multiply(result, base)
        base = _multiply(base, base)
        exponent >>= 1
    return result

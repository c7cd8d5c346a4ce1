"""CRC-32 joined from pieces is that of the whole."""

import zlib

import hypothesis.strategies as st
from hypothesis import given

from flash_moe_mlx.packing.checksums import combine, combine_segments, zeros


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_two_pieces(first: bytes, second: bytes):
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(pieces=st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=50)), max_size=6), rest=st.integers(0, 99))
def test_segments_with_zeros_between(pieces: list[tuple[int, bytes]], rest: int):
    whole, segments = b"", []
    for gap, data in pieces:
        whole += bytes(gap)
        segments.append((len(whole), len(data), zlib.crc32(data)))
        whole += data
    whole += bytes(rest)
    assert combine_segments(segments, len(whole)) == zlib.crc32(whole)


def test_large_lengths():
    data, nbytes = b"expert", 3 * (1 << 20) + 1
    assert zeros(nbytes) == zlib.crc32(bytes(nbytes))
    assert combine(zlib.crc32(data), zeros(nbytes), nbytes) == zlib.crc32(data + bytes(nbytes))

import pytest

from flash_moe_mlx.config import StreamingConfig, parse_size
from flash_moe_mlx.errors import RequestError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (123, 123), ("123", 123), ("8GB", 8_000_000_000), ("8GiB", 8 << 30), ("8 gb", 8_000_000_000),
        ("7.5GiB", 15 << 29), ("512MB", 512_000_000), ("1K", 1000), ("1kib", 1024), (".5MB", 500_000),
        ("2T", 2 * 10**12),
    ],
)  # fmt: skip
def test_sizes(text: int | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "8 bananas", "GB", "-1GB", "1e9", "8GB8", None, True, 1.5, 0, -1, "0GB", [8]])
def test_refused_sizes(text: object) -> None:
    with pytest.raises(RequestError, match=r"\[memory_limit\]"):
        parse_size(text)  # type: ignore[arg-type]


def test_scratch_is_set_aside_for_no_more_than_the_context() -> None:
    assert StreamingConfig.from_arguments(None, 100, None, "auto").prefill_step_size == 100
    assert StreamingConfig.from_arguments("1GB", 10_000, None, "mmap").prefill_step_size == 2048


@pytest.mark.parametrize(
    "arguments",
    [(None, 0, None, "auto"), (None, True, None, "auto"), (None, 8, 0, "auto"), (None, 8, True, "auto"),
     (None, 8, 2.0, "auto"), (None, 8, None, "fast"), ("x", 8, None, "auto")],
)  # fmt: skip
def test_refused_arguments(arguments: tuple) -> None:
    with pytest.raises(RequestError):
        StreamingConfig.from_arguments(*arguments)

import pytest

from solera_core.errors import ConfigError
from solera_core.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000", 1000),
        ("512MB", 512 * 10**6),
        ("512 mb", 512 * 10**6),
        ("2G", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("7k", 7000),
        ("7KiB", 7168),
        ("1T", 10**12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text, where="--memory") == expected


@pytest.mark.parametrize("text", ["", "MB", "-1", "1.", "1e9", "12 XB", "i", "5i", "1 2"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory: .* is no size; write for example 512MB"):
        parse_bytes(text, where="--memory")

"""Sizes as people write them: 512MB, 2GB, 1.5 GiB."""

import re
from typing import Final

from solera_core.errors import ConfigError

__all__ = ["parse_bytes"]

_UNITS: Final = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def parse_bytes(text: str, *, where: str) -> int:
    """The number of bytes that a size stands for; K, M, G, T are powers of 1000, Ki, Mi, Gi, Ti of 1024.

    Raises:
        ConfigError: it is none; `where` says whose value it is.

    Example:
        >>> parse_bytes("1.5GB", where="--memory")
        1500000000
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{where}: {text!r} is no size; write for example 512MB, 2GB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])

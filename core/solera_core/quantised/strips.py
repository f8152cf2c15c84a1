"""Weights whose file holds columns where rows are wanted: decoded a strip of rows at a time."""

import threading
from collections.abc import Callable

import numpy as np

from solera_core.quantised.parts import Float32

__all__ = ["Strips", "strip_height"]

_STRIP_ELEMENTS = 1 << 19  # 2 MB of float32: long enough reads, and little memory


def strip_height(columns: int, multiple: int) -> int:
    """Rows a strip."""
    return max(1, _STRIP_ELEMENTS // (columns * multiple)) * multiple


class Strips:
    """The strip that each thread decoded last: it reads a tensor from front to back, so it needs each strip once."""

    def __init__(self) -> None:
        self._last = threading.local()

    def rows(
        self, name: str, first: int, last: int, height: int, total: int, decode: Callable[[int, int], Float32]
    ) -> Float32:
        """Rows [first, last) of `total`, a new array.

        `decode(a, b)` gives rows [a, b), where a is a multiple of `height`, and b the next one or the end.
        """
        parts: list[Float32] = []
        for start in range(first // height * height, last, height):
            if getattr(self._last, "key", None) != (name, start):
                self._last.strip = decode(start, min(start + height, total))
                self._last.key = (name, start)
            parts.append(self._last.strip[max(first - start, 0) : last - start])
        return np.concatenate(parts)

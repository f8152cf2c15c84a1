"""How many directions a matrix really has, from its singular values.

They are the square roots of the eigenvalues of D D^T or D^T D, whichever is smaller, summed in float64 from blocks of
rows, so that no whole copy of D is held. (What is below 1e-8 of the largest singular value is lost that way; it has no
weight in either rank.)
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["effective_rank", "singular_values", "stable_rank"]

Float64 = npt.NDArray[np.float64]

_ELEMENTS: Final = 1 << 22  # of a block of rows: 32 MB


def singular_values(rows: Callable[[int, int], Float64], shape: tuple[int, int]) -> Float64:
    """The singular values of a matrix, descending [min(shape)].

    Args:
        rows: rows [start, stop) of the matrix; where it is wider than high, read once for every pair of blocks.
        shape: of the matrix.
    """
    height, width = shape
    step = max(_ELEMENTS // width, 1)
    cuts = [(at, min(at + step, height)) for at in range(0, height, step)]
    gram = np.zeros((min(shape), min(shape)))
    if width <= height:
        for start, stop in cuts:
            block = rows(start, stop)
            gram += block.T @ block
    else:
        for i, (start, stop) in enumerate(cuts):
            block = rows(start, stop)
            gram[start:stop, start:stop] = block @ block.T
            for first, last in cuts[i + 1 :]:
                gram[first:last, start:stop] = rows(first, last) @ block.T  # eigvalsh reads the lower triangle only
    squares = np.linalg.eigvalsh(gram)[::-1].astype(np.float64)
    return np.sqrt(np.maximum(squares, 0.0))


def effective_rank(values: Float64) -> float | None:
    """The exponential of the entropy of s / sum s: n for n equal values; None for a zero matrix.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = float(values.sum())
    if not total:
        return None
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(values: Float64) -> float | None:
    """The sum of s^2 over the largest s^2, never above the rank; None for a zero matrix."""
    largest = float(values.max(initial=0.0))
    return float(((values / largest) ** 2).sum()) if largest else None

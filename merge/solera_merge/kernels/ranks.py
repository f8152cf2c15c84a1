"""Ranks within rows, by counting digits instead of comparing."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel

__all__ = ["rank_rows"]

_BITS = 11  # of a digit: three of them hold the 31 magnitude bits, and 2048 counters stay in the first-level cache
_DIGITS = 3
_MASK = np.uint32((1 << _BITS) - 1)


@kernel
def rank_rows(words: npt.NDArray[np.uint32], width: int, ranks: npt.NDArray[np.int64]) -> None:
    """ranks[i] = place of words[i] within its row, 0 the smallest; of equal words the first has the highest place.

    Args:
        words: magnitude bits of whole rows, [n].
        width: elements a row.
        ranks: [n], overwritten.
    """
    counts = np.empty((_DIGITS, 1 << _BITS), np.int64)
    order, turned = np.empty(width, np.uint32), np.empty(width, np.uint32)
    for begin in range(0, words.size, width):
        row = words[begin : begin + width]
        counts[:] = 0
        for j in range(width):
            word = row[j]
            counts[0, word & _MASK] += 1
            counts[1, (word >> np.uint32(_BITS)) & _MASK] += 1
            counts[2, word >> np.uint32(2 * _BITS)] += 1
        for d in range(_DIGITS):
            place = 0
            for v in range(1 << _BITS):
                number = counts[d, v]
                counts[d, v] = place
                place += number
        # Stable passes over the columns from the last to the first: of equal words the first comes last.
        for j in range(width):
            order[j] = width - 1 - j
        for d in range(_DIGITS):
            shift = np.uint32(d * _BITS)
            for j in range(width):
                column = order[j]
                digit = (row[column] >> shift) & _MASK
                turned[counts[d, digit]] = column
                counts[d, digit] += 1
            order, turned = turned, order
        out = ranks[begin : begin + width]
        for j in range(width):
            out[order[j]] = j

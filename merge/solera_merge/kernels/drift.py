"""How far the result is from the reference, summed on the way."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.formats import PIECE

__all__ = ["LANES", "add_drift", "add_drift_of_block"]

LANES = 32


@kernel
def add_drift(
    result: npt.NDArray[np.float32], reference: npt.NDArray[np.float32], m: int, sums: npt.NDArray[np.float64]
) -> None:
    """sums[0] += |result - reference|^2, sums[1] += |reference|^2, over the first m elements.

    A piece is summed in 32 lanes of float32 (its sums are good to some 1e-6), pieces in float64 in the order they come.
    """
    change, size = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    whole = m // LANES * LANES
    a = result[:whole].reshape((whole // LANES, LANES))
    b = reference[:whole].reshape((whole // LANES, LANES))
    for row in range(whole // LANES):
        for j in range(LANES):
            d = a[row, j] - b[row, j]
            change[j] += d * d
            size[j] += b[row, j] * b[row, j]
    for j in range(whole, m):
        d = result[j] - reference[j]
        change[0] += d * d
        size[0] += reference[j] * reference[j]
    changed, there = np.float64(0), np.float64(0)
    for j in range(LANES):
        changed += change[j]
        there += size[j]
    sums[0] += changed
    sums[1] += there


@kernel
def add_drift_of_block(
    result: npt.NDArray[np.float32], reference: npt.NDArray[np.float32], sums: npt.NDArray[np.float64]
) -> None:
    """`add_drift` piece by piece over a block of any length."""
    for begin in range(0, result.size, PIECE):
        m = min(PIECE, result.size - begin)
        add_drift(result[begin : begin + m], reference[begin : begin + m], m, sums)

"""Norms and dot products in float64, in the order that `solera_merge.reduction` lays down."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.formats import widen

__all__ = ["dot_chunks", "norms_and_dots"]

Float64 = npt.NDArray[np.float64]


@kernel
def dot_chunks(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], chunk: int, lanes: int, sums: npt.NDArray[np.float64]
) -> None:
    """The sums of a * b over chunks.

    Args:
        a: [n].
        b: [n].
        chunk: elements a chunk; the last one may be shorter.
        lanes: element j of a chunk is added to lane j mod `lanes`; then the lanes are added from the first to the last.
        sums: [number of chunks], overwritten.
    """
    partial = np.empty(lanes)
    for c in range(sums.size):
        begin = c * chunk
        end = min(begin + chunk, a.size)
        sums[c] = _dot(a[begin:end], b[begin:end], partial)


@kernel
def _dot(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], partial: npt.NDArray[np.float64]) -> np.float64:
    lanes = partial.size
    partial[:] = 0
    whole = a.size // lanes * lanes
    rows_a = a[:whole].reshape((whole // lanes, lanes))
    rows_b = b[:whole].reshape((whole // lanes, lanes))
    for row in range(whole // lanes):
        for j in range(lanes):
            partial[j] += np.float64(rows_a[row, j]) * np.float64(rows_b[row, j])
    for j in range(a.size - whole):
        partial[j] += np.float64(a[whole + j]) * np.float64(b[whole + j])
    total = partial[0]
    for j in range(1, lanes):
        total += partial[j]
    return total


@kernel
def norms_and_dots(
    raw: npt.NDArray[np.uint8],
    codes: npt.NDArray[np.int64],
    n: int,
    chunk: int,
    lanes: int,
    sums: npt.NDArray[np.float64],
) -> bool:
    """Chunk sums of W_0^2, W_1^2 and W_0 W_1; the base is the last row. Whether an input is not finite.

    Args:
        raw: two rows; see `solera_merge.kernels`.
        codes: of the rows.
        n: elements.
        chunk: see `dot_chunks`.
        lanes: see `dot_chunks`.
        sums: [3, number of chunks], overwritten.
    """
    a, b = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
    partial = np.empty(lanes)
    bad = False
    for c in range(sums.shape[1]):
        begin = c * chunk
        m = min(chunk, n - begin)
        bad |= widen(raw[1], codes[1], begin, m, a)
        bad |= widen(raw[0], codes[0], begin, m, b)
        sums[0, c] = _dot(a[:m], a[:m], partial)
        sums[1, c] = _dot(b[:m], b[:m], partial)
        sums[2, c] = _dot(a[:m], b[:m], partial)
    return bad

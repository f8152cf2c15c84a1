"""Norms and dot products in float64, in the order that `solera_merge.reduction` lays down."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.formats import widen

__all__ = ["dot", "dot_chunks", "gram_chunks"]

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
        sums[c] = dot(a[begin:end], b[begin:end], partial)


@kernel
def dot(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], partial: npt.NDArray[np.float64]) -> np.float64:
    """Sum a * b; `partial` is scratch space, one place a lane."""
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
    return np.float64(total)


@kernel
def gram_chunks(
    raw: npt.NDArray[np.uint8],
    codes: npt.NDArray[np.int64],
    n: int,
    count: int,
    chunk: int,
    lanes: int,
    sums: npt.NDArray[np.float64],
) -> bool:
    """Chunk sums of x_i x_j for j <= i. Whether an input is not finite.

    Args:
        raw: see `solera_merge.kernels`.
        codes: of the rows.
        n: elements.
        count: number of models; x_i is W_i, or W_i - W_0 where there is one more row, the base.
        chunk: see `dot_chunks`.
        lanes: see `dot_chunks`.
        sums: [count (count + 1) / 2, number of chunks], overwritten; pair (i, j) is row i (i + 1) / 2 + j.
    """
    values, base = np.empty((count, chunk), np.float32), np.empty(chunk, np.float32)
    partial = np.empty(lanes)
    bad = False
    for c in range(sums.shape[1]):
        begin = c * chunk
        m = min(chunk, n - begin)
        if codes.size > count:
            bad |= widen(raw[count], codes[count], begin, m, base)
        for i in range(count):
            value = values[i]
            bad |= widen(raw[i], codes[i], begin, m, value)
            if codes.size > count:
                for j in range(m):
                    value[j] = value[j] - base[j]
        pair = 0
        for i in range(count):
            for k in range(i + 1):
                sums[pair, c] = dot(values[i, :m], values[k, :m], partial)
                pair += 1
    return bad

"""Weighted sums straight from stored bytes to stored bytes: linear, slerp, task arithmetic, scaled copies."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.drift import add_drift
from solera_merge.kernels.formats import PIECE, narrow, widen
from solera_merge.kernels.spans import Rows, fill

__all__ = ["weighted_deltas", "weighted_sum"]

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@kernel
def weighted_sum(
    rows: Rows,
    n: int,
    step: int,
    coefficients: npt.NDArray[np.float32],
    divisor: np.float32,
    out: npt.NDArray[np.uint8],
    out_code: int,
    drift: npt.NDArray[np.float64],
    reference: int,
) -> int:
    """sum_i c_i W_i / divisor, in that order; see `solera_merge.kernels` for the arguments and the result.

    `reference` is the row that the drift is measured from.
    """
    bad = 0
    total = np.empty(PIECE, np.float32)
    kept = np.empty(PIECE, np.float32)
    term = np.empty(PIECE, np.float32)
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        bad |= fill(rows, begin, n, step)
        at = begin % step
        for i in range(coefficients.size):
            c = coefficients[i]
            piece = kept if i == reference else term
            if widen(rows.raw[i], rows.codes[i], at, m, piece):
                bad |= 1
            if i == 0:
                for j in range(m):
                    total[j] = piece[j] * c
            else:
                for j in range(m):
                    total[j] += piece[j] * c
        if divisor != 1:
            for j in range(m):
                total[j] /= divisor
        add_drift(total, kept, m, drift)
        if narrow(total, m, out, out_code, begin):
            bad |= 2
    return bad


@kernel
def weighted_deltas(
    rows: Rows,
    n: int,
    step: int,
    coefficients: npt.NDArray[np.float32],
    divisor: np.float32,
    scale: np.float32,
    out: npt.NDArray[np.uint8],
    out_code: int,
    drift: npt.NDArray[np.float64],
) -> int:
    """W_0 + scale * (sum_i c_i (W_i - W_0) / divisor); the base is the last row of `raw`."""
    bad = 0
    models = coefficients.size
    base = np.empty(PIECE, np.float32)
    total = np.empty(PIECE, np.float32)
    term = np.empty(PIECE, np.float32)
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        bad |= fill(rows, begin, n, step)
        at = begin % step
        if widen(rows.raw[models], rows.codes[models], at, m, base):
            bad |= 1
        for i in range(models):
            c = coefficients[i]
            if widen(rows.raw[i], rows.codes[i], at, m, term):
                bad |= 1
            if i == 0:
                for j in range(m):
                    total[j] = (term[j] - base[j]) * c
            else:
                for j in range(m):
                    total[j] += (term[j] - base[j]) * c
        if divisor != 1:
            for j in range(m):
                total[j] /= divisor
        if scale != 1:
            for j in range(m):
                total[j] *= scale
        for j in range(m):
            total[j] += base[j]
        add_drift(total, base, m, drift)
        if narrow(total, m, out, out_code, begin):
            bad |= 2
    return bad

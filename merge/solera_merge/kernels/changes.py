"""Methods that look at single changes: nearswap, and the counts and averages of ram; as in `methods/`."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.deltas import load_deltas
from solera_merge.kernels.drift import add_drift
from solera_merge.kernels.formats import PIECE, narrow, widen
from solera_merge.kernels.spans import Rows, fill

__all__ = ["count_changes", "merge_changes", "merge_near"]

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]
Drift = npt.NDArray[np.float64]


@kernel
def merge_near(rows: Rows, n: int, step: int, limit: np.float32, out: Bytes, out_code: int, drift: Drift) -> int:
    """W_1 where |W_1 - W_0| <= limit, else W_0 + limit in its direction."""
    bad = 0
    model, base, merged = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        bad |= fill(rows, begin, n, step)
        at = begin % step
        if widen(rows.raw[0], rows.codes[0], at, m, model):
            bad |= 1
        if widen(rows.raw[1], rows.codes[1], at, m, base):
            bad |= 1
        for j in range(m):
            delta = model[j] - base[j]
            moved = base[j] + (limit if delta > 0 else -limit)
            merged[j] = model[j] if np.abs(delta) <= limit else moved
        add_drift(merged, base, m, drift)
        if narrow(merged, m, out, out_code, begin):
            bad |= 2
    return bad


@kernel
def count_changes(raw: Bytes, codes: Codes, n: int, epsilon: np.float32, counts: npt.NDArray[np.int64]) -> bool:
    """Add to counts [N, 2] how many elements each model changes by more than epsilon, with others and alone.

    Whether an input is not finite.
    """
    models = codes.size - 1
    base, terms = np.empty(PIECE, np.float32), np.empty((models, PIECE), np.float32)
    number = np.empty(PIECE, np.uint32)
    bad = False
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        bad |= load_deltas(raw, codes, begin, m, base, terms)
        for j in range(m):
            number[j] = np.uint32(0)
        for i in range(models):
            term = terms[i]
            for j in range(m):
                number[j] += np.uint32(np.abs(term[j]) > epsilon)
        for i in range(models):
            term = terms[i]
            changed, alone = np.uint32(0), np.uint32(0)
            for j in range(m):
                mine = np.uint32(np.abs(term[j]) > epsilon)
                changed += mine
                alone += mine & np.uint32(number[j] == 1)
            counts[i, 0] += int(changed) - int(alone)
            counts[i, 1] += int(alone)
    return bad


@kernel
def merge_changes(
    rows: Rows, n: int, step: int, epsilon: np.float32, scales: Float32, out: Bytes, out_code: int, drift: Drift
) -> int:
    """W_0 + the mean of the changes above epsilon, or scales[i] times the change of the only model that has one."""
    bad = 0
    models = scales.size
    base, merged = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    terms = np.empty((models, PIECE), np.float32)
    number = np.empty(PIECE, np.float32)
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        bad |= fill(rows, begin, n, step)
        at = begin % step
        if load_deltas(rows.raw, rows.codes, at, m, base, terms):
            bad |= 1
        for j in range(m):
            number[j] = np.float32(0)
        for i in range(models):
            term = terms[i]
            for j in range(m):
                number[j] += np.float32(np.abs(term[j]) > epsilon)
        for i in range(models):
            term, scale = terms[i], scales[i]
            for j in range(m):
                term[j] *= np.float32(np.abs(term[j]) > epsilon)
            if scale != 1:
                for j in range(m):
                    term[j] *= scale if number[j] == 1 else np.float32(1)
            for j in range(m):
                term[j] /= max(number[j], np.float32(1))
            if i == 0:
                for j in range(m):
                    merged[j] = term[j]
            else:
                for j in range(m):
                    merged[j] += term[j]
        for j in range(m):
            merged[j] += base[j]
        add_drift(merged, base, m, drift)
        if narrow(merged, m, out, out_code, begin):
            bad |= 2
    return bad

"""Arcee Fusion: divergence of rows, importance of changes, and the choice; see `methods.arcee_fusion`.

The exponential is written out (range reduction and the series), so that it has the same bits on every machine and the
compiler can use vector instructions; it is good to an ulp.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.drift import add_drift
from solera_merge.kernels.formats import PIECE, narrow, widen

__all__ = ["divergence_of_rows", "exponentials", "importances", "merge_important", "row_divergences"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]

_LANES: Final = 32
_LOWEST: Final = -700.0  # exp of less is as good as 0 in a sum that holds exp(0)
_PER_LN2: Final = 1.0 / math.log(2)
_LN2_HIGH: Final = float.fromhex("0x1.62e42feep-1")  # times a whole number up to 2^20 it is exact
_LN2_LOW: Final = float.fromhex("0x1.a39ef35793c76p-33")
_MAGIC: Final = 1.5 * 2.0**52  # adding it leaves a whole number in the lowest bits
_ONE_EXPONENT = np.int64(1023 << 52)
_U52 = np.int64(52)


@kernel
def exponentials(values: Float64, m: int, scale: Float64) -> None:
    """values[:m] = exp(values[:m]), for values of at most 0; `scale` is scratch space of that length."""
    bits = scale.view(np.int64)
    for j in range(m):
        x = max(values[j], _LOWEST)
        shifted = x * _PER_LN2 + _MAGIC
        whole = shifted - _MAGIC
        scale[j] = shifted
        r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
        p = 1.0 / 6227020800.0
        p = p * r + 1.0 / 479001600.0
        p = p * r + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
        values[j] = 1.0 + (r + r * r * p)
    for j in range(m):
        bits[j] = (bits[j] << _U52) + _ONE_EXPONENT
    for j in range(m):
        values[j] *= scale[j]


@kernel
def row_divergences(model: Float32, base: Float32, width: int, out: Float32) -> None:
    """KL(softmax W_1 || softmax W_0) of every row, not below 0, which only rounding could make it.

    Args:
        model: whole rows of W_1, [n].
        base: whole rows of W_0, [n].
        width: elements a row.
        out: [n / width], overwritten.
    """
    p, q, scale = np.empty(PIECE), np.empty(PIECE), np.empty(PIECE)
    sums = np.empty((3, _LANES))
    for row in range(out.size):
        out[row] = _divergence(
            model[row * width : (row + 1) * width], base[row * width : (row + 1) * width], p, q, scale, sums
        )


@kernel
def _divergence(model: Float32, base: Float32, p: Float64, q: Float64, scale: Float64, sums: Float64) -> np.float32:
    """With x and y as they are, less their maxima: sum p (x - y) - log sum exp x + log sum exp y, p = softmax x."""
    top_model, top_base = np.float64(_maximum(model)), np.float64(_maximum(base))
    sums[:] = 0.0
    of_model, of_base, of_change = sums[0], sums[1], sums[2]
    for begin in range(0, model.size, PIECE):
        m = min(PIECE, model.size - begin)
        x, y = model[begin : begin + m], base[begin : begin + m]
        for j in range(m):
            p[j] = np.float64(x[j]) - top_model
            q[j] = np.float64(y[j]) - top_base
        exponentials(p, m, scale)
        exponentials(q, m, scale)
        for j in range(m):
            scale[j] = p[j] * ((np.float64(x[j]) - top_model) - (np.float64(y[j]) - top_base))
        _add_lanes(p, m, of_model)
        _add_lanes(q, m, of_base)
        _add_lanes(scale, m, of_change)
    total_model, total_base, total_change = _total(of_model), _total(of_base), _total(of_change)
    found = total_change / total_model - math.log(total_model) + math.log(total_base)
    return np.float32(max(found, 0.0))


@kernel
def _add_lanes(values: Float64, m: int, lanes: Float64) -> None:
    """Element j is added to lane j mod `_LANES`."""
    whole = m // _LANES * _LANES
    rows = values[:whole].reshape((whole // _LANES, _LANES))
    for row in range(whole // _LANES):
        for j in range(_LANES):
            lanes[j] += rows[row, j]
    for j in range(whole, m):
        lanes[j - whole] += values[j]


@kernel
def _total(lanes: Float64) -> np.float64:
    total = 0.0
    for j in range(_LANES):
        total += lanes[j]
    return np.float64(total)


@kernel
def _maximum(values: Float32) -> np.float32:
    lanes = np.full(_LANES, values[0], np.float32)
    whole = values.size // _LANES * _LANES
    rows = values[:whole].reshape((whole // _LANES, _LANES))
    for row in range(whole // _LANES):
        for j in range(_LANES):
            lanes[j] = rows[row, j] if rows[row, j] > lanes[j] else lanes[j]
    largest = lanes[0]
    for j in range(1, _LANES):
        largest = max(largest, lanes[j])
    for j in range(whole, values.size):
        largest = max(largest, values[j])
    return np.float32(largest)


@kernel
def divergence_of_rows(raw: Bytes, codes: Codes, n: int, width: int, out: Float32) -> bool:
    """`row_divergences` of a block of whole rows, out [n / width]. Whether an input is not finite."""
    model, base = np.empty(width, np.float32), np.empty(width, np.float32)
    bad = False
    for row in range(n // width):
        bad |= widen(raw[0], codes[0], row * width, width, model)
        bad |= widen(raw[1], codes[1], row * width, width, base)
        row_divergences(model, base, width, out[row : row + 1])
    return bad


@kernel
def importances(raw: Bytes, codes: Codes, n: int, divergence: Float32, out: Float32) -> None:
    """out[:n] = |W_1 - W_0| times the divergence of the row, for a block of whole rows with divergence [rows]."""
    width = n // divergence.size
    base = np.empty(width, np.float32)
    for row in range(divergence.size):
        widen(raw[1], codes[1], row * width, width, base)
        values, factor = out[row * width : (row + 1) * width], divergence[row]
        widen(raw[0], codes[0], row * width, width, values)
        for j in range(width):
            values[j] = np.abs(values[j] - base[j]) * factor


@kernel
def merge_important(
    raw: Bytes,
    codes: Codes,
    n: int,
    divergence: Float32,
    limit: np.float32,
    out: Bytes,
    out_code: int,
    drift: npt.NDArray[np.float64],
) -> int:
    """W_1 where the importance is at least `limit`, else W_0; see `importances`."""
    bad = 0
    width = n // divergence.size
    model, base, merged = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for row in range(divergence.size):
        factor = divergence[row]
        for begin in range(row * width, (row + 1) * width, PIECE):
            m = min(PIECE, (row + 1) * width - begin)
            if widen(raw[0], codes[0], begin, m, model):
                bad |= 1
            if widen(raw[1], codes[1], begin, m, base):
                bad |= 1
            for j in range(m):
                merged[j] = model[j] if np.abs(model[j] - base[j]) * factor >= limit else base[j]
            add_drift(merged, base, m, drift)
            if narrow(merged, m, out, out_code, begin):
                bad |= 2
    return bad

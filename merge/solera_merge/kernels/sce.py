"""SCE behind its selection: squares of what is kept, and the merge, as in `methods.sce`."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.deltas import load_deltas, spreads
from solera_merge.kernels.drift import add_drift
from solera_merge.kernels.elections import ELECT_UNWEIGHTED
from solera_merge.kernels.formats import PIECE, narrow
from solera_merge.kernels.norms import dot
from solera_merge.kernels.spans import Rows, fill
from solera_merge.kernels.sparsified import ALL, SIGN, merge_kept

__all__ = ["merge_selected", "squares_of_selected"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]


@kernel
def squares_of_selected(
    raw: Bytes, codes: Codes, n: int, start: int, bits: np.uint32, last: int, chunk: int, lanes: int, sums: Float64
) -> bool:
    """Chunk sums of the squares of the deltas that are kept, [N, chunks]. Whether an input is not finite.

    Kept is where the spread of the deltas exceeds the float32 `bits`, or equals it up to flat index `last`.
    `chunk`, `lanes`: see `solera_merge.kernels.norms.dot_chunks`.
    """
    models = codes.size - 1
    base, terms = np.empty(chunk, np.float32), np.empty((models, chunk), np.float32)
    mean, squares, spread = np.empty(chunk), np.empty(chunk), np.empty(chunk, np.float32)
    partial = np.empty(lanes)
    bad = False
    for c in range(sums.shape[1]):
        begin = c * chunk
        m = min(chunk, n - begin)
        bad |= load_deltas(raw, codes, begin, m, base, terms)
        _select(terms, m, start + begin, bits, last, mean, squares, spread)
        for i in range(models):
            sums[i, c] = dot(terms[i, :m], terms[i, :m], partial)
    return bad


@kernel
def merge_selected(
    rows: Rows,
    n: int,
    step: int,
    start: int,
    bits: np.uint32,
    last: int,
    weight: Float32,
    out: Bytes,
    out_code: int,
    drift: Float64,
) -> int:
    """W_0 + the weighted mean of the kept deltas that have the elected sign; see `squares_of_selected`."""
    bad = 0
    base, merged = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    terms = np.empty((weight.size, PIECE), np.float32)
    mean, squares, spread = np.empty(PIECE), np.empty(PIECE), np.empty(PIECE, np.float32)
    one = np.float32(1)
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        bad |= fill(rows, begin, n, step)
        at = begin % step
        if load_deltas(rows.raw, rows.codes, at, m, base, terms):
            bad |= 1
        _select(terms, m, start + begin, bits, last, mean, squares, spread)
        merge_kept(terms, m, weight, ELECT_UNWEIGHTED, True, one, one, base, merged)
        add_drift(merged, base, m, drift)
        if narrow(merged, m, out, out_code, begin):
            bad |= 2
    return bad


@kernel
def _select(
    terms: Float32, m: int, first: int, bits: np.uint32, last: int, mean: Float64, squares: Float64, spread: Float32
) -> None:
    """Leave the deltas [N, m] where the spread says so, else make them 0; element 0 has flat index `first`."""
    if bits == 0 and last >= first + m:
        return
    spreads(terms, m, mean, squares, spread)
    masks = spread.view(np.uint32)
    equal = min(max(last + 1 - first, 0), m)
    for j in range(equal):
        masks[j] = ALL if masks[j] >= bits else SIGN
    later = masks[equal:m]
    for j in range(m - equal):
        later[j] = ALL if later[j] > bits else SIGN
    for i in range(len(terms)):
        words = terms[i].view(np.uint32)
        for j in range(m):
            words[j] &= masks[j]

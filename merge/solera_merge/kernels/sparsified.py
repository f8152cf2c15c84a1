"""Sparsified task vectors, combined: ties, dare_ties, dare_linear, from stored bytes to stored bytes."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.drift import add_drift
from solera_merge.kernels.formats import PIECE, narrow, widen
from solera_merge.kernels.philox import philox_words

__all__ = ["merge_kept", "merge_largest", "merge_random"]

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]

_MAGNITUDE = np.uint32(0x7FFFFFFF)


@kernel
def merge_largest(
    raw: Bytes,
    codes: Codes,
    n: int,
    start: int,
    bits: npt.NDArray[np.uint32],
    last: npt.NDArray[np.int64],
    weight: Float32,
    normalize: bool,
    scale: np.float32,
    out: Bytes,
    out_code: int,
    drift: npt.NDArray[np.float64],
) -> int:
    """TIES behind its selection: model i keeps |delta| > bits[i], and of those equal to it the ones up to last[i]."""
    bad = 0
    models = weight.size
    base, merged = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    terms = np.empty((models, PIECE), np.float32)
    words = terms.view(np.uint32)
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        if _load(raw, codes, begin, m, base, terms):
            bad |= 1
        for i in range(models):
            term, word, limit = terms[i], words[i], bits[i]
            equal = min(max(last[i] + 1 - (start + begin), 0), m)  # equal ones before this place are kept
            for j in range(equal):
                term[j] *= np.float32((word[j] & _MAGNITUDE) >= limit)
            later, later_word = term[equal:m], word[equal:m]
            for j in range(m - equal):
                later[j] *= np.float32((later_word[j] & _MAGNITUDE) > limit)
        merge_kept(terms, m, weight, True, normalize, np.float32(1), scale, base, merged)
        add_drift(merged, base, m, drift)
        if narrow(merged, m, out, out_code, begin):
            bad |= 2
    return bad


@kernel
def merge_random(
    raw: Bytes,
    codes: Codes,
    n: int,
    start: int,
    keys: npt.NDArray[np.uint64],
    limits: npt.NDArray[np.uint64],
    factors: Float32,
    weight: Float32,
    elect: bool,
    normalize: bool,
    plain_divisor: np.float32,
    scale: np.float32,
    out: Bytes,
    out_code: int,
    drift: npt.NDArray[np.float64],
) -> int:
    """DARE: model i keeps an element where its random word is below limits[i], times factors[i].

    `keys` is [N, 2]: key and upper half of the counter (`solera_merge.masks.split_key`); `start` a multiple of 4.
    """
    bad = 0
    models = weight.size
    base, merged = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    terms = np.empty((models, PIECE), np.float32)
    words = np.empty(PIECE, np.uint32)
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        if _load(raw, codes, begin, m, base, terms):
            bad |= 1
        for i in range(models):
            term, limit, factor = terms[i], limits[i], factors[i]
            if limit < np.uint64(1 << 32):
                philox_words(keys[i, 0], keys[i, 1], np.uint64((start + begin) // 4), words[: (m + 3) // 4 * 4])
                below = np.uint32(limit)
                for j in range(m):
                    term[j] *= np.float32(words[j] < below)
            for j in range(m):
                term[j] *= factor
        merge_kept(terms, m, weight, elect, normalize, plain_divisor, scale, base, merged)
        add_drift(merged, base, m, drift)
        if narrow(merged, m, out, out_code, begin):
            bad |= 2
    return bad


@kernel
def _load(raw: Bytes, codes: Codes, begin: int, m: int, base: Float32, terms: Float32) -> bool:
    """The base, and the deltas of all models; whether one value is not finite."""
    models = terms.shape[0]
    bad = widen(raw[models], codes[models], begin, m, base)
    for i in range(models):
        term = terms[i]
        bad |= widen(raw[i], codes[i], begin, m, term)
        for j in range(m):
            term[j] = term[j] - base[j]
    return bad


@kernel
def merge_kept(
    terms: Float32,
    m: int,
    weight: Float32,
    elect: bool,
    normalize: bool,
    plain_divisor: np.float32,
    scale: np.float32,
    base: Float32,
    merged: Float32,
) -> None:
    """Into `merged`: base + scale * (weighted deltas of the elected sign, or all, summed, perhaps divided by weights).

    As `solera_merge.signs`, operation by operation. `terms` [N, PIECE] is overwritten. Where a sign is elected, the
    divisor is that of the models that agree; else it is `plain_divisor`.
    """
    models = weight.size
    total = merged
    divisor = np.empty(PIECE, np.float32)
    plus = np.empty(PIECE, np.bool_)
    for i in range(models):
        term, w = terms[i], weight[i]
        for j in range(m):
            term[j] *= w
    if elect:
        _sum(terms, m, total)
        for j in range(m):
            plus[j] = total[j] >= np.float32(0)
        for i in range(models):
            term, w = terms[i], np.float32(abs(weight[i]))
            if i == 0:
                for j in range(m):
                    agrees = np.float32((term[j] != 0) & ((term[j] > 0) == plus[j]))
                    term[j] *= agrees
                    divisor[j] = agrees * w
            else:
                for j in range(m):
                    agrees = np.float32((term[j] != 0) & ((term[j] > 0) == plus[j]))
                    term[j] *= agrees
                    divisor[j] += agrees * w
    _sum(terms, m, total)
    if not elect:
        if normalize and plain_divisor != 1:
            for j in range(m):
                total[j] /= plain_divisor
    elif normalize:
        for j in range(m):
            total[j] /= np.float32(1) if divisor[j] == 0 else divisor[j]
    if scale != 1:
        for j in range(m):
            total[j] *= scale
    for j in range(m):
        total[j] = base[j] + total[j]


@kernel
def _sum(terms: Float32, m: int, total: Float32) -> None:
    first = terms[0]
    for j in range(m):
        total[j] = first[j]
    for i in range(1, terms.shape[0]):
        term = terms[i]
        for j in range(m):
            total[j] += term[j]

"""Sparsified task vectors, combined (ties, breadcrumbs, dare), from stored bytes to stored bytes."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.deltas import load_deltas
from solera_merge.kernels.drift import add_drift
from solera_merge.kernels.elections import ELECT_NONE, ELECT_UNWEIGHTED, ELECT_WEIGHTED
from solera_merge.kernels.formats import PIECE, narrow, widen
from solera_merge.kernels.norms import dot
from solera_merge.kernels.philox import philox_words
from solera_merge.kernels.spans import Rows, fill

__all__ = [
    "ALL",
    "SIGN",
    "l1_chunks",
    "merge_band",
    "merge_kept",
    "merge_random",
]

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
ALL, SIGN = np.uint32(0xFFFFFFFF), np.uint32(0x80000000)
"""Bits that are left of a number: those of what is kept, and those of what is made 0."""


@kernel
def merge_band(
    rows: Rows,
    n: int,
    step: int,
    start: int,
    outer: Words,
    outer_last: Places,
    inner: Words,
    inner_last: Places,
    factors: Float32,
    weight: Float32,
    elect: int,
    normalize: bool,
    plain_divisor: np.float32,
    scale: np.float32,
    out: Bytes,
    out_code: int,
    drift: npt.NDArray[np.float64],
) -> int:
    """TIES and breadcrumbs behind their selection.

    Model i keeps |delta| > outer[i], and of those equal to it the ones up to place outer_last[i]; less those that
    `inner` and `inner_last` give in the same way (inner[i] = 0x7FFFFFFF: none). What it keeps is multiplied by
    factors[i].
    """
    bad = 0
    models = weight.size
    base, merged = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    terms = np.empty((models, PIECE), np.float32)
    for begin in range(0, n, PIECE):
        m = min(PIECE, n - begin)
        bad |= fill(rows, begin, n, step)
        at = begin % step
        if load_deltas(rows.raw, rows.codes, at, m, base, terms):
            bad |= 1
        for i in range(models):
            term = terms[i]
            _keep_band(term, m, start + begin, outer[i], outer_last[i], inner[i], inner_last[i])
            factor = factors[i]
            if factor != 1:
                for j in range(m):
                    term[j] *= factor
        merge_kept(terms, m, weight, elect, normalize, plain_divisor, scale, base, merged)
        add_drift(merged, base, m, drift)
        if narrow(merged, m, out, out_code, begin):
            bad |= 2
    return bad


@kernel
def l1_chunks(
    raw: Bytes,
    codes: Codes,
    n: int,
    start: int,
    model: int,
    outer: np.uint32,
    outer_last: int,
    inner: np.uint32,
    inner_last: int,
    chunk: int,
    lanes: int,
    sums: npt.NDArray[np.float64],
) -> None:
    """Chunk sums of |delta| of one model, before and after the selection of `merge_band`, [2, chunks].

    `chunk`, `lanes`: see `solera_merge.kernels.norms.dot_chunks`.
    """
    base, signs = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
    terms = np.empty((1, chunk), np.float32)
    term = terms[0]
    partial = np.empty(lanes)
    for c in range(sums.shape[1]):
        begin = c * chunk
        m = min(chunk, n - begin)
        widen(raw[codes.size - 1], codes[codes.size - 1], begin, m, base)
        widen(raw[model], codes[model], begin, m, term)
        for j in range(m):
            term[j] = term[j] - base[j]
            signs[j] = np.sign(term[j])
        sums[0, c] = dot(term[:m], signs[:m], partial)
        _keep_band(term, m, start + begin, outer, outer_last, inner, inner_last)
        sums[1, c] = dot(term[:m], signs[:m], partial)


@kernel
def _keep_band(
    term: Float32, m: int, first: int, outer: np.uint32, outer_last: int, inner: np.uint32, inner_last: int
) -> None:
    """Leave what is kept, make 0 (with its sign, as a product with 0 has it) what is not; term[0] has index `first`."""
    words = term.view(np.uint32)
    if inner < _MAGNITUDE:
        equal = min(max(inner_last + 1 - first, 0), m)  # those that equal the threshold count up to here
        for j in range(equal):
            words[j] &= ALL if (words[j] & _MAGNITUDE) < inner else SIGN
        later = words[equal:m]
        for j in range(m - equal):
            later[j] &= ALL if (later[j] & _MAGNITUDE) <= inner else SIGN
    equal = min(max(outer_last + 1 - first, 0), m)
    for j in range(equal):
        words[j] &= ALL if (words[j] & _MAGNITUDE) >= outer else SIGN
    later = words[equal:m]
    for j in range(m - equal):
        later[j] &= ALL if (later[j] & _MAGNITUDE) > outer else SIGN


@kernel
def merge_random(
    rows: Rows,
    n: int,
    step: int,
    start: int,
    keys: npt.NDArray[np.uint64],
    limits: npt.NDArray[np.uint64],
    factors: Float32,
    weight: Float32,
    elect: int,
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
        bad |= fill(rows, begin, n, step)
        at = begin % step
        if load_deltas(rows.raw, rows.codes, at, m, base, terms):
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
def merge_kept(
    terms: Float32,
    m: int,
    weight: Float32,
    elect: int,
    normalize: bool,
    plain_divisor: np.float32,
    scale: np.float32,
    base: Float32,
    merged: Float32,
) -> None:
    """Into `merged`: base + scale * (weighted deltas of the elected sign, or all, summed, perhaps divided by weights).

    As `solera_merge.signs`, operation by operation. `terms` [N, PIECE] is overwritten. `elect` is one of
    `elections`. Where a sign is elected, the divisor is that of the models that agree; else it is `plain_divisor`.
    """
    models = weight.size
    total = merged
    divisor = np.empty(PIECE, np.float32)
    plus = np.empty(PIECE, np.bool_)
    if elect == ELECT_UNWEIGHTED:
        _elect(terms, m, total, plus)
    for i in range(models):
        term, w = terms[i], weight[i]
        for j in range(m):
            term[j] *= w
    if elect == ELECT_WEIGHTED:
        _elect(terms, m, total, plus)
    if elect != ELECT_NONE:
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
    if elect == ELECT_NONE:
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
def _elect(terms: Float32, m: int, total: Float32, plus: npt.NDArray[np.bool_]) -> None:
    _sum(terms, m, total)
    for j in range(m):
        plus[j] = total[j] >= np.float32(0)


@kernel
def _sum(terms: Float32, m: int, total: Float32) -> None:
    first = terms[0]
    for j in range(m):
        total[j] = first[j]
    for i in range(1, terms.shape[0]):
        term = terms[i]
        for j in range(m):
            total[j] += term[j]

"""DELLA: ranks within rows, by counting digits instead of comparing; what is kept by rank; and the merge of that."""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.deltas import load_deltas
from solera_merge.kernels.drift import add_drift
from solera_merge.kernels.formats import PIECE, narrow
from solera_merge.kernels.philox import philox_words
from solera_merge.kernels.sparsified import merge_kept

__all__ = ["merge_ranked", "rank_rows"]

Float32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
Words64 = npt.NDArray[np.uint64]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_U32 = np.uint64(32)
_ALL = np.uint32(0xFFFFFFFF)
_FEW_BITS, _MOST_BITS = 8, 11  # of a digit, at most; clearing 2048 counters takes as long as moving so many elements
_MANY = 1000


@kernel
def rank_rows(words: Words, width: int, ranks: npt.NDArray[np.int64]) -> None:
    """ranks[i] = place of words[i] within its row, 0 the smallest; of equal words the first has the highest place.

    Args:
        words: magnitude bits of whole rows, [n].
        width: elements a row.
        ranks: [n], overwritten.
    """
    order, spare = np.empty(width, np.uint64), np.empty(width, np.uint64)
    counts = np.empty(1 << _MOST_BITS, np.int64)
    for begin in range(0, words.size, width):
        row, out = words[begin : begin + width], ranks[begin : begin + width]
        number = _sort(row, order, spare, counts)
        zeros = width - number
        for j in range(number):
            out[order[j] & np.uint64(0xFFFFFFFF)] = zeros + j
        for j in range(width):
            if row[j] == 0:
                zeros -= 1
                out[j] = zeros


@kernel
def _sort(row: Words, order: Words64, spare: Words64, counts: npt.NDArray[np.int64]) -> int:
    """Into `order`: the places (lower half) of what is not 0, ascending; of equal words the first comes last.

    How many there are. `spare` and `counts` are scratch space. Zeros take part in no choice, and many task vectors are
    mostly zeros. Only bits that differ are looked at: of bfloat16 weights that is half of them.
    """
    width = row.size
    seen, shared = np.uint32(0), _ALL
    for j in range(width):
        seen |= row[j]
        shared &= row[j] if row[j] != 0 else _ALL
    number = 0
    for i in range(width):  # from the last to the first, and the passes are stable
        j = width - 1 - i
        order[number] = (np.uint64(row[j]) << _U32) | np.uint64(j)
        number += int(row[j] != 0)
    low, high = 0, 0
    differ = int(seen & ~shared)
    while differ >> high != 0:
        high += 1
    while low < high and (differ >> low) & 1 == 0:
        low += 1
    most = _FEW_BITS if number < _MANY else _MOST_BITS
    passes = (high - low + most - 1) // most
    source, target = order, spare
    for d in range(passes):
        bits = (high - low + passes - 1) // passes
        shift, mask = np.uint64(32 + low + d * bits), np.uint64((1 << bits) - 1)
        places = counts[: 1 << bits]
        places[:] = 0
        for j in range(number):
            places[(source[j] >> shift) & mask] += 1
        place = 0
        for v in range(1 << bits):
            here = places[v]
            places[v] = place
            place += here
        for j in range(number):
            entry = source[j]
            digit = (entry >> shift) & mask
            target[places[digit]] = entry
            places[digit] += 1
        source, target = target, source
    if passes % 2 == 1:
        order[:number] = source[:number]
    return number


@kernel
def merge_ranked(
    raw: npt.NDArray[np.uint8],
    codes: npt.NDArray[np.int64],
    n: int,
    start: int,
    width: int,
    keys: Words64,
    drops: npt.NDArray[np.bool_],
    limits: Words,
    factors: Float32,
    weight: Float32,
    elect: int,
    normalize: bool,
    plain_divisor: np.float32,
    scale: np.float32,
    out: npt.NDArray[np.uint8],
    out_code: int,
    drift: npt.NDArray[np.float64],
) -> int:
    """DELLA on whole rows of `width` elements.

    Model i keeps the element of rank r where its random word is below limits[i, r], times factors[i, r]; all as they
    are unless drops[i]. `keys` as for `solera_merge.kernels.sparsified.merge_random`.
    """
    bad = 0
    models = weight.size
    base, merged = np.empty(width, np.float32), np.empty(PIECE, np.float32)
    rows, terms = np.empty((models, width), np.float32), np.empty((models, PIECE), np.float32)
    magnitude, words = np.empty(width, np.uint32), np.empty((width + 6) // 4 * 4, np.uint32)
    order, spare = np.empty(width, np.uint64), np.empty(width, np.uint64)
    counts = np.empty(1 << _MOST_BITS, np.int64)
    for begin in range(0, n, width):
        if load_deltas(raw, codes, begin, width, base, rows):
            bad |= 1
        for i in range(models):
            if not drops[i]:
                continue
            row, limit, factor = rows[i], limits[i], factors[i]
            bits = row.view(np.uint32)
            for j in range(width):
                magnitude[j] = bits[j] & _MAGNITUDE
            skip = (start + begin) % 4
            first = np.uint64((start + begin) // 4)
            philox_words(keys[i, 0], keys[i, 1], first, words[: (skip + width + 3) // 4 * 4])
            drawn = words[skip : skip + width]
            number = _sort(magnitude, order, spare, counts)
            for j in range(number):
                rank = width - number + j
                place = order[j] & np.uint64(0xFFFFFFFF)
                row[place] = row[place] * np.float32(drawn[place] < limit[rank]) * factor[rank]
        for at in range(0, width, PIECE):
            m = min(PIECE, width - at)
            for i in range(models):
                term, part = terms[i], rows[i, at : at + m]
                for j in range(m):
                    term[j] = part[j]
            merge_kept(terms, m, weight, elect, normalize, plain_divisor, scale, base[at : at + m], merged)
            add_drift(merged, base[at : at + m], m, drift)
            if narrow(merged, m, out, out_code, begin + at):
                bad |= 2
    return bad

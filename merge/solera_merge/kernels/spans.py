"""Spans of a tensor from file to result in one call: compiled code reads the files itself, a cached piece at a time.

Python is asked once a megabyte instead of five times a block, and threads do not wait for each other's turn with the
interpreter. Where `rows.files` is empty, `rows.raw` already holds all elements, and `step` is `n`.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from solera_merge.kernels.compiled import kernel
from solera_merge.kernels.sparsified import merge_largest, merge_random
from solera_merge.kernels.sums import weighted_deltas, weighted_sum

__all__ = ["UNREADABLE", "Rows", "fill", "span_of_deltas", "span_of_largest", "span_of_random", "span_of_sum"]

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

UNREADABLE: Final = 4
"""Bit of a result: a file could not be read, or was cut. Whoever sees it reads again and says what is wrong."""

_pread: Any = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))
_WIDTHS: Final = (4, 2, 2)  # bytes an element, by code (`solera_merge.kernels.formats`)


class Rows(NamedTuple):
    """The sources of a span.

    Attributes:
        raw: [N, bytes] uint8, a row a source; holds the elements, or is where they are read to.
        codes: [N] int64, number formats.
        files: [N] int32, open descriptors; empty where nothing is to be read.
        offsets: [N] int64, of the span's first byte in each file.
    """

    raw: Bytes
    codes: npt.NDArray[np.int64]
    files: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]


@kernel
def fill(rows: Rows, at: int, n: int) -> int:
    """Read elements [at, at + n) of the span to the beginning of the rows; `UNREADABLE` or 0."""
    for i in range(rows.files.size):
        width = _WIDTHS[rows.codes[i]]
        address, wanted, done = rows.raw[i].ctypes.data, n * width, 0
        while done < wanted:
            got = _pread(rows.files[i], address + done, wanted - done, rows.offsets[i] + at * width + done)
            if got <= 0:
                return UNREADABLE
            done += got
    return 0


@kernel
def span_of_sum(
    rows: Rows,
    n: int,
    step: int,
    coefficients: Float32,
    divisor: np.float32,
    out: Bytes,
    out_code: int,
    drift: npt.NDArray[np.float64],
    reference: int,
) -> int:
    """`solera_merge.kernels.sums.weighted_sum` over a span."""
    bad = 0
    for at in range(0, n, step):
        m = min(step, n - at)
        bad |= fill(rows, at, m)
        to = out[at * _WIDTHS[out_code] :]
        bad |= weighted_sum(rows.raw, rows.codes, m, coefficients, divisor, to, out_code, drift, reference)
        if bad:
            break
    return bad


@kernel
def span_of_deltas(
    rows: Rows,
    n: int,
    step: int,
    coefficients: Float32,
    divisor: np.float32,
    scale: np.float32,
    out: Bytes,
    out_code: int,
    drift: npt.NDArray[np.float64],
) -> int:
    """`solera_merge.kernels.sums.weighted_deltas` over a span."""
    bad = 0
    for at in range(0, n, step):
        m = min(step, n - at)
        bad |= fill(rows, at, m)
        to = out[at * _WIDTHS[out_code] :]
        bad |= weighted_deltas(rows.raw, rows.codes, m, coefficients, divisor, scale, to, out_code, drift)
        if bad:
            break
    return bad


@kernel
def span_of_largest(
    rows: Rows,
    n: int,
    step: int,
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
    """`solera_merge.kernels.sparsified.merge_largest` over a span that begins at element `start`."""
    bad = 0
    for at in range(0, n, step):
        m = min(step, n - at)
        bad |= fill(rows, at, m)
        to = out[at * _WIDTHS[out_code] :]
        bad |= merge_largest(
            rows.raw, rows.codes, m, start + at, bits, last, weight, normalize, scale, to, out_code, drift
        )
        if bad:
            break
    return bad


@kernel
def span_of_random(
    rows: Rows,
    n: int,
    step: int,
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
    """`solera_merge.kernels.sparsified.merge_random` over a span that begins at element `start`."""
    bad = 0
    for at in range(0, n, step):
        m = min(step, n - at)
        bad |= fill(rows, at, m)
        to = out[at * _WIDTHS[out_code] :]
        bad |= merge_random(
            rows.raw,
            rows.codes,
            m,
            start + at,
            keys,
            limits,
            factors,
            weight,
            elect,
            normalize,
            plain_divisor,
            scale,
            to,
            out_code,
            drift,
        )
        if bad:
            break
    return bad

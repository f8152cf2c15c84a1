"""Spans of a tensor from file to result in one call: compiled code reads the files itself, a cached piece at a time.

Python is asked once a megabyte instead of five times a block, and threads do not wait for each other's turn with the
interpreter. Where `rows.files` is empty, `rows.raw` already holds all elements, and `step` is `n`.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from solera_merge.kernels.compiled import kernel

__all__ = ["UNREADABLE", "Rows", "fill"]

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
def fill(rows: Rows, begin: int, n: int, step: int) -> int:
    """Where element `begin` of the span's `n` begins a step, read that step into the rows; `UNREADABLE` or 0.

    Element `begin` is then number `begin % step` of each row. `step` is a multiple of the pieces that a kernel works
    on, or at least `n`.
    """
    if begin % step != 0:
        return 0
    for i in range(rows.files.size):
        width = _WIDTHS[rows.codes[i]]
        address, wanted, done = rows.raw[i].ctypes.data, min(step, n - begin) * width, 0
        while done < wanted:
            got = _pread(rows.files[i], address + done, wanted - done, rows.offsets[i] + begin * width + done)
            if got <= 0:
                return UNREADABLE
            done += got
    return 0

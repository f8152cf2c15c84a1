"""Philox4x32-10: random words by position, not by turn.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 3.
"""

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel

__all__ = ["philox_words"]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@kernel
def philox_words(key: np.uint64, high: np.uint64, first: np.uint64, out: npt.NDArray[np.uint32]) -> None:
    """Fill `out` (a multiple of 4 words) from counter `first` on.

    Args:
        key: two 32-bit words, the lower half first.
        high: the upper 64 bits of the 128-bit counter.
        first: the lower 64 bits of the first counter; one step gives 4 words.
        out: receives words 4 * first, 4 * first + 1, ... of the stream.
    """
    for j in range(out.size // 4):
        counter = first + np.uint64(j)
        x0, x1, x2, x3 = counter, counter >> _HALF, high, high >> _HALF
        a, b = key & _LOW, key >> _HALF
        for _ in range(10):
            # 64-bit lanes whose lower halves count: this is what the compiler turns into vector instructions. The
            # vector product takes lower halves only, so cutting them out where they are multiplied costs nothing.
            p, q = _M0 * (x0 & _LOW), _M1 * (x2 & _LOW)
            x0, x1, x2, x3 = (q >> _HALF) ^ x1 ^ a, q, (p >> _HALF) ^ x3 ^ b, p
            a, b = (a + _W0) & _LOW, (b + _W1) & _LOW
        out[4 * j] = np.uint32(x0 & _LOW)
        out[4 * j + 1] = np.uint32(x1 & _LOW)
        out[4 * j + 2] = np.uint32(x2 & _LOW)
        out[4 * j + 3] = np.uint32(x3 & _LOW)

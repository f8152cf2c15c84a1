"""Stored numbers to float32 and back, a few thousand elements at a time, with an eye on NaN and infinity.

Each function handles a piece that stays in the first-level cache and says whether it met a value that is not finite.
The results equal `solera_core.dtypes` bit for bit.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from solera_merge.kernels.compiled import kernel

__all__ = ["BF16", "CODES", "F16", "F32", "PIECE", "narrow", "widen"]

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

F32, BF16, F16 = 0, 1, 2
CODES: Final = {"F32": F32, "BF16": BF16, "F16": F16}
"""The formats that kernels read and write, by safetensors name."""

PIECE = 2048
"""Elements in the first-level cache: 8 KB of float32 an array."""

_U16, _U13, _U1 = np.uint32(16), np.uint32(13), np.uint32(1)
_SIGN, _MAGNITUDE = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_INF = np.uint32(0x7F800000)
_ROUNDS_TO_INF = np.uint32(0x7F7F8000)  # half-way from the largest bfloat16 to infinity, which is the even one
_HALF_TO_SINGLE = np.float32(2.0**112)  # moves the exponent from a bias of 15 to one of 127, also for subnormals
_SMALLEST_HALF = np.uint32(0x38800000)  # 2^-14: below it halves are subnormal
_SUBNORMAL = np.uint32(0x3F000000)  # 0.5: adding it leaves 24 - 1 fraction bits at 2^-24, the step of subnormal halves


@kernel
def widen(raw: Bytes, code: int, begin: int, n: int, out: Float32) -> bool:
    """Elements [begin, begin + n) of `raw` as float32 into out[:n]; whether one of them is NaN or infinite."""
    bits = out.view(np.uint32)
    bad = False
    if code == BF16:
        halves = raw.view(np.uint16)[begin : begin + n]
        for i in range(n):
            word = np.uint32(halves[i]) << _U16
            bad |= (word & _INF) == _INF
            bits[i] = word
    elif code == F32:
        words = raw.view(np.uint32)[begin : begin + n]
        for i in range(n):
            bad |= (words[i] & _INF) == _INF
            bits[i] = words[i]
    else:
        halves = raw.view(np.uint16)[begin : begin + n]
        for i in range(n):
            half = np.uint32(halves[i])
            bad |= (half & np.uint32(0x7C00)) == np.uint32(0x7C00)
            bits[i] = (half & np.uint32(0x7FFF)) << _U13
        for i in range(n):
            out[i] = out[i] * _HALF_TO_SINGLE
        for i in range(n):
            bits[i] |= (np.uint32(halves[i]) & np.uint32(0x8000)) << _U16
    return bad


@kernel
def narrow(values: Float32, n: int, raw: Bytes, code: int, begin: int) -> bool:
    """values[:n] into elements [begin, begin + n) of `raw`, to nearest even; whether one is not finite there."""
    bits = values.view(np.uint32)
    bad = False
    if code == BF16:
        halves = raw.view(np.uint16)[begin : begin + n]
        largest = np.uint32(0)
        for i in range(n):
            word = bits[i]
            largest = max(largest, word & _MAGNITUDE)
            halves[i] = np.uint16((word + np.uint32(0x7FFF) + ((word >> _U16) & _U1)) >> _U16)
        bad = largest >= _ROUNDS_TO_INF
    elif code == F32:
        words = raw.view(np.uint32)[begin : begin + n]
        for i in range(n):
            bad |= (bits[i] & _INF) == _INF
            words[i] = bits[i]
    else:
        halves = raw.view(np.uint16)[begin : begin + n]
        for i in range(n):
            word = bits[i]
            magnitude = word & _MAGNITUDE
            sign = (word & _SIGN) >> _U16
            if magnitude < _SMALLEST_HALF:
                half = _subnormal_half(magnitude)
            else:
                half = (magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + ((magnitude >> _U13) & _U1)) >> _U13
                bad |= half >= np.uint32(0x7C00)
            halves[i] = np.uint16(sign | half)
    return bad


@kernel
def _subnormal_half(magnitude: np.uint32) -> np.uint32:
    """The half of a float32 below 2^-14: the adder of the processor does the rounding."""
    one = np.empty(1, np.uint32)
    one[0] = magnitude
    value = one.view(np.float32)
    value[0] += np.float32(0.5)
    return one[0] - _SUBNORMAL

"""Number formats on disk: safetensors' names, their sizes, and the way to and from float32 in numpy alone."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solera_core.errors import CheckpointError

__all__ = ["FLOATS", "ITEM_BYTES", "SAFETENSORS_NAME", "from_float32", "nonfinite", "to_float32"]

ITEM_BYTES: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes an element, by safetensors name. Formats of less than a byte (F4, F6) are not read."""

FLOATS: Final = ("F32", "F16", "BF16", "F64")
"""The formats in which models are merged; every other is moved as bytes, or dequantised (`solera_core.quantised`)."""

SAFETENSORS_NAME: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
"""From torch's and transformers' spelling."""

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def _e4m3() -> Float32:
    """The 256 values of the E4M3FN format (arXiv 2209.05433): no infinity, S.1111.111 is NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def _e8m0() -> Float32:
    """The 256 values of the E8M0 format (OCP Microscaling Formats 1.0): powers of two from 2^-127, 255 is NaN."""
    values = 2.0 ** (np.arange(256) - 127.0)
    values[255] = np.nan
    return values.astype(np.float32)


_ONE_BYTE: Final = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),  # the upper half of F16
    "F8_E8M0": _e8m0(),
}


def to_float32(raw: Bytes, dtype: str) -> Float32:
    """The float32 values of stored bytes; exact, but for F64, which is rounded to nearest even.

    Args:
        raw: contiguous bytes, a whole number of elements.
        dtype: one of `FLOATS`, or F8_E4M3, F8_E5M2, F8_E8M0.
    """
    match dtype:
        case "F32":
            return raw.view(np.float32)
        case "F16":
            return raw.view(np.float16).astype(np.float32)
        case "BF16":
            wide = raw.view(np.uint16).astype(np.uint32)
            np.left_shift(wide, np.uint32(16), out=wide)
            return wide.view(np.float32)
        case "F64":
            # Beyond float32 becomes inf, which the finite check of the writer names; signalling NaN becomes quiet NaN.
            with np.errstate(over="ignore", invalid="ignore"):
                return raw.view(np.float64).astype(np.float32)
        case "F8_E4M3" | "F8_E5M2" | "F8_E8M0":
            return _ONE_BYTE[dtype][raw]
        case _:
            raise CheckpointError(
                f"numbers stored as {dtype} cannot be computed with (only {', '.join(FLOATS)}); "
                "a quantised checkpoint must be dequantised first"
            )


def from_float32(values: Float32, dtype: str) -> Bytes:
    """The bytes of float32 values in `dtype` (one of `FLOATS`), rounded to nearest, ties to even; NaN stays NaN.

    Values beyond the range of the format become infinite, as IEEE 754 has it: check with `nonfinite` afterwards.
    """
    values = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    match dtype:
        case "F32":
            return values.view(np.uint8)
        case "F16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16).view(np.uint8)
        case "BF16":
            bits = values.view(np.uint32)
            # Adding 0x7fff plus the lowest kept bit carries into the kept half exactly when rounding up is right.
            rounded = (bits >> np.uint32(16)) & np.uint32(1)
            rounded += np.uint32(0x7FFF)
            rounded += bits
            rounded >>= np.uint32(16)
            half = rounded.astype(np.uint16)
            nan = np.isnan(values)
            if nan.any():  # the carry could turn a NaN into an infinity: keep its sign and set the quiet bit
                half[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
            return half.view(np.uint8)
        case "F64":
            return values.astype(np.float64).view(np.uint8)
        case _:
            raise CheckpointError(f"numbers cannot be written as {dtype}, only as {', '.join(FLOATS)}")


_EXPONENT: Final[dict[str, tuple[Any, int]]] = {
    # word type and exponent mask: an element is inf or NaN exactly when all exponent bits are set
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F64": (np.uint64, 0x7FF0000000000000),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),  # this format has no infinity and one NaN magnitude, all seven bits set
}


def nonfinite(raw: Bytes, dtype: str) -> int:
    """How many elements of the stored bytes are NaN or infinite (0 for formats that have neither)."""
    if dtype not in _EXPONENT:
        return 0
    word, mask = _EXPONENT[dtype]
    bits = raw.view(word)
    return int(np.count_nonzero((bits & word(mask)) == word(mask)))

"""Packed codes and the numbers they stand for, by tables with one row a byte."""

from functools import cache
from typing import Final

import numpy as np

from solera_core.quantised.parts import Bytes, Float32

__all__ = ["E2M1", "fp4", "integers", "table_of_pairs"]

E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the 4-bit format E2M1 (OCP Microscaling Formats 1.0), by code."""


def table_of_pairs(values: Float32, *, high_first: bool = False) -> Float32:
    """[256, 2]: the two numbers of every byte of 4-bit codes, the low half first unless `high_first`."""
    byte = np.arange(256)
    halves = (byte >> 4, byte & 15) if high_first else (byte & 15, byte >> 4)
    return np.stack([values[half] for half in halves], axis=1).astype(np.float32)


_FP4: Final = table_of_pairs(np.array(E2M1, np.float32))


def fp4(raw: Bytes) -> Float32:
    """[..., n] bytes as [..., 2 n] numbers in E2M1, the low half of a byte first."""
    return _FP4[raw].reshape(*raw.shape[:-1], 2 * raw.shape[-1])


@cache
def integers(bits: int, offset: int = 0) -> Float32:
    """[256, 8 / bits]: the unsigned integers in every byte, less `offset`; the lowest bits first.

    (A 32-bit word in little-endian order, which safetensors has, is four such bytes, the lowest first.)
    """
    byte = np.arange(256)[:, None]
    return ((byte >> np.arange(0, 8, bits) & (1 << bits) - 1) - offset).astype(np.float32)

"""Integer weights with a scale and a zero point a group of inputs, stored input by input: what GPTQ and AWQ share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from solera_core.quantised.parts import Float32, Stored, Weight, by_rows
from solera_core.quantised.strips import Strips, strip_height

__all__ = ["Grouped", "grouped_weight"]

Codes: TypeAlias = Callable[[int, int], tuple[Float32, Float32]]


@dataclass(frozen=True)
class Grouped:
    """One weight [out, in] of a module.

    Attributes:
        module: its name, with the dot behind it.
        out: rows.
        inputs: columns.
        group_size: inputs a group, where `g_idx` does not say it.
        multiple: rows that share a word.
        g_idx: name of the tensor with the group of every input.
        codes: of rows [a, b): codes [b - a, in] and zero points [groups, b - a].
    """

    module: str
    out: int
    inputs: int
    group_size: int
    multiple: int
    g_idx: str | None
    codes: Codes


def grouped_weight(stored: Stored, strips: Strips, weight: Grouped, parts: tuple[str, ...]) -> Weight:
    """The weight scale * (code - zero point), read a strip of rows at a time."""
    height = strip_height(weight.inputs, weight.multiple)
    decode = partial(_decode, stored, weight)

    def rows(first: int, last: int) -> Float32:
        return strips.rows(weight.module, first, last, height, weight.out, decode)

    read = by_rows(weight.inputs, rows)
    return Weight(f"{weight.module}weight", (weight.out, weight.inputs), parts, read, height * weight.inputs)


def _decode(stored: Stored, weight: Grouped, first: int, last: int) -> Float32:
    codes, zeros = weight.codes(first, last)
    scales = stored.float_columns(f"{weight.module}scales", first, last)
    group = _group(stored, weight, len(scales))
    return (codes - zeros.T[:, group]) * scales.T[:, group]


def _group(stored: Stored, weight: Grouped, groups: int) -> npt.NDArray[np.int64]:
    """The group of every input."""
    if weight.g_idx is None:
        return np.arange(weight.inputs) // weight.group_size
    found = stored.raw(weight.g_idx).view("<i4").astype(np.int64)
    if found.min() < 0 or found.max() >= groups:
        raise stored.broken(weight.g_idx, f"holds a group outside 0 to {groups - 1}")
    return found

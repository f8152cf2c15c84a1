"""Scales (and zero points) of a weight: one number for every block of its elements."""

import math
from dataclasses import dataclass

import numpy as np

from solera_core.dtypes import to_float32
from solera_core.headers import TensorInfo
from solera_core.quantised.parts import Float32, Stored

__all__ = ["Grid", "grid_of"]


@dataclass(frozen=True)
class Grid:
    """One number a block of `height` x `width` elements of each matrix (the last two axes) of a weight.

    Attributes:
        name: of the stored tensor.
        rows: of one matrix of the weight.
        columns: of the weight.
        grid_rows: of one matrix of the grid.
        grid_columns: of the grid.
        height: rows that share a number.
        width: columns that share a number.
        shared: all matrices have the same numbers.
        exponents: the numbers are stored as bytes e and stand for 2^(e - 127).
        integers: the numbers are stored as integers of one byte.
    """

    name: str
    rows: int
    columns: int
    grid_rows: int
    grid_columns: int
    height: int
    width: int
    shared: bool
    exponents: bool
    integers: bool

    def expanded(self, stored: Stored, first: int, last: int) -> Float32:
        """The number of every element of rows [first, last), the rows of all matrices counted on: [rows, columns]."""
        row = np.arange(first, last)
        index = row % self.rows // self.height
        if not self.shared:
            index += row // self.rows * self.grid_rows
        low, high = int(index.min()), int(index.max()) + 1
        at = slice(low * self.grid_columns, high * self.grid_columns)
        if self.exponents:
            values = to_float32(stored.raw(self.name, at.start, at.stop), "F8_E8M0")
        elif self.integers:
            values = stored.raw(self.name, at.start, at.stop).view(np.int8).astype(np.float32)
        else:
            values = stored.values(self.name, at.start, at.stop)
        wide = np.repeat(values.reshape(high - low, self.grid_columns), self.width, axis=1)[:, : self.columns]
        return wide[index - low].astype(np.float32, copy=False)


def grid_of(
    stored: Stored,
    name: str,
    shape: tuple[int, ...],
    *,
    block: tuple[int, int] | None = None,
    exponents: bool = False,
    integers: bool = False,
) -> Grid | None:
    """The grid that a stored tensor is for a weight of this shape; None, and a problem, if it fits none.

    Args:
        stored: the checkpoint.
        name: of the tensor: a scalar, a number a matrix, a row each, or blocks.
        shape: of the weight.
        block: height and width where the settings say so; the last of each may be cut off. Else they follow from the
            two shapes, and divide the weight evenly.
        exponents: bytes are exponents.
        integers: they are zero points, of one byte.
    """
    info = stored.tensors[name]
    floats = ("F32", "BF16", "F16", "F8_E8M0", "F8_E4M3")
    if not stored.expect(name, dtypes=(*floats, *(["U8"] if exponents else []), *(["I8"] if integers else []))):
        return None
    rows, columns = shape[-2:] if len(shape) > 1 else (1, *shape)
    found = _grid_shape(info, shape)
    if found is None:
        stored.problem(name, f"fits no weight of shape {shape}")
        return None
    grid_rows, grid_columns, shared = found
    if block is not None and (grid_rows, grid_columns) != (1, 1):
        height, width = block
        wanted = (math.ceil(rows / height), math.ceil(columns / width))
        if (grid_rows, grid_columns) != wanted:
            stored.problem(name, f"a weight of shape {shape} in blocks of {height} x {width} has {wanted} of them")
            return None
    elif rows % grid_rows or columns % grid_columns:
        stored.problem(name, f"does not divide a weight of shape {shape} evenly")
        return None
    else:
        height, width = rows // grid_rows, columns // grid_columns
    return Grid(
        name,
        rows,
        columns,
        grid_rows,
        grid_columns,
        height,
        width,
        shared,
        exponents=info.dtype == "U8",
        integers=info.dtype == "I8",
    )


def _grid_shape(info: TensorInfo, shape: tuple[int, ...]) -> tuple[int, int, bool] | None:
    """Rows and columns of the grid of one matrix, and whether all matrices share it."""
    matrices, rows = shape[:-2], shape[-2] if len(shape) > 1 else 1
    if info.size == 1:
        return 1, 1, True
    if len(info.shape) == len(shape) and info.shape[:-2] == matrices:
        return (info.shape[-2] if len(shape) > 1 else 1), info.shape[-1], False
    if info.shape == (*matrices, rows):
        return rows, 1, False
    if matrices and info.shape == matrices:
        return 1, 1, False
    return None

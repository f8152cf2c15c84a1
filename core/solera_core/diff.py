"""How far two checkpoints are apart, tensor by tensor, read in blocks with float64 sums."""

import math
from typing import Any, Final

import numpy as np

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import FLOATS
from solera_core.headers import TensorInfo

__all__ = ["diff"]

_BLOCK: Final = 1 << 20  # elements


def diff(a: Checkpoint, b: Checkpoint) -> list[dict[str, Any]]:
    """One row a tensor of either checkpoint, in the order of `a`, then what only `b` has.

    Each row: `name`, `shape` (of `a`, or of `b` where only that has it), `relative_change` = |b - a| / |a| (Frobenius
    norms), `cosine`, `max_abs` = max |b - a|, `identical` (same dtype and bytes), and `note` (`only in a`, `only in b`,
    both shapes or dtypes where they differ, `not finite`, else empty). Figures that do not exist (a change from zero,
    an angle with zero, integers, NaN) are None.
    """
    rows = [_row(a, b, info, b.tensors.get(name)) for name, info in a.tensors.items()]
    return rows + [_blank(info, "only in b") for name, info in b.tensors.items() if name not in a.tensors]


def _blank(info: TensorInfo, note: str) -> dict[str, Any]:
    return {
        "name": info.name,
        "shape": list(info.shape),
        "relative_change": None,
        "cosine": None,
        "max_abs": None,
        "identical": False,
        "note": note,
    }


def _row(a: Checkpoint, b: Checkpoint, left: TensorInfo, right: TensorInfo | None) -> dict[str, Any]:
    if right is None:
        return _blank(left, "only in a")
    if left.shape != right.shape:
        return _blank(left, f"shape {list(left.shape)} and {list(right.shape)}")
    note = "" if left.dtype == right.dtype else f"dtype {left.dtype} and {right.dtype}"
    row = _blank(left, note)
    raw = left.dtype == right.dtype and not a.is_derived(left.name) and not b.is_derived(left.name)
    if left.dtype not in FLOATS or right.dtype not in FLOATS:
        if raw:
            row["identical"] = all(
                np.array_equal(a.read_raw(left.name, at, end), b.read_raw(left.name, at, end))
                for at, end in _ranges(left.size)
            )
        return row
    identical = left.dtype == right.dtype
    square_a = square_b = square_d = dot = largest = 0.0
    for at, end in _ranges(left.size):
        x, y = a.read_flat(left.name, at, end), b.read_flat(left.name, at, end)
        if identical and raw and left.dtype == "F64":  # its float32 values could hide a difference
            identical = np.array_equal(a.read_raw(left.name, at, end), b.read_raw(left.name, at, end))
        identical = identical and np.array_equal(x.view(np.uint32), y.view(np.uint32))
        x64, y64 = x.astype(np.float64), y.astype(np.float64)
        d = y64 - x64
        square_a += float(np.dot(x64, x64))
        square_b += float(np.dot(y64, y64))
        square_d += float(np.dot(d, d))
        dot += float(np.dot(x64, y64))
        largest = float(np.maximum(largest, np.abs(d).max(initial=0.0)))
    norms = math.sqrt(square_a) * math.sqrt(square_b)
    row["identical"] = identical
    if not math.isfinite(square_a + square_b + square_d):
        row["note"] = "not finite"
        return row
    if square_a or not square_d:
        row["relative_change"] = math.sqrt(square_d / square_a) if square_a else 0.0
    row["cosine"] = dot / norms if norms else None
    row["max_abs"] = largest
    return row


def _ranges(size: int) -> list[tuple[int, int]]:
    return [(at, min(at + _BLOCK, size)) for at in range(0, size, _BLOCK)]

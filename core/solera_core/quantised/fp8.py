"""8-bit floating point: every weight with a scale, for the whole, each row or blocks of it. value = code * scale.

DeepSeek-V3's layout (`weight_scale_inv`, blocks of 128 x 128), MXFP8 (blocks of 1 x 32, exponents for scales), AutoFP8
and FBGEMM (`weight_scale`). Beside them there may be experts of packed 4-bit floats (two of E2M1 a byte, in I8).
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from solera_core.quantised.codes import fp4
from solera_core.quantised.grid import Grid, grid_of
from solera_core.quantised.parts import Float32, Scheme, Stored, Weight, by_rows

__all__ = ["F8", "fp8", "scaled"]

F8: Final = ("F8_E4M3", "F8_E5M2")


def fp8(stored: Stored, settings: Mapping[str, Any]) -> Scheme:
    """quant_method fp8, fbgemm_fp8, mxfp8."""
    block = _block(stored, settings)
    weights: list[Weight] = []
    for name, info in stored.tensors.items():
        if info.dtype not in (*F8, "I8") or name.endswith("_scale_inv"):
            continue
        found = [name + end for end in ("_scale_inv", "_scale") if name + end in stored.tensors]
        stored.seen.update(found)
        if len(found) != 1:
            stored.problem(name, f"needs its scale, {name + '_scale_inv'!r} or {name + '_scale'!r}; found {found}")
            continue
        packed = info.dtype == "I8"
        shape = (*info.shape[:-1], info.shape[-1] * 2) if packed else info.shape
        grid = grid_of(stored, found[0], shape, block=None if packed else block, exponents=True)
        if grid is not None:
            weights.append(scaled(stored, name, name, shape, grid, packed=packed))
    label = "fp8" if block is None else f"fp8, blocks of {block[0]} x {block[1]}"
    return Scheme(label, weights, stored.activations())


def scaled(
    stored: Stored,
    name: str,
    codes: str,
    shape: tuple[int, ...],
    scale: Grid,
    zero: Grid | None = None,
    *,
    packed: bool = False,
) -> Weight:
    """(code - zero point) * scale, the codes in F8 or I8, or `packed`: two of E2M1 a byte."""
    columns, info = shape[-1], stored.tensors[codes]
    width = info.shape[-1]

    def rows(first: int, last: int) -> Float32:
        raw = stored.raw(codes, first * width, last * width)
        if packed:
            values = fp4(raw)
        elif info.dtype == "I8":
            values = raw.view(np.int8).astype(np.float32)
        else:
            values = stored.values(codes, first * width, last * width)
        values = values.reshape(last - first, columns)
        if zero is not None:
            values = values - zero.expanded(stored, first, last)
        return values * scale.expanded(stored, first, last)

    parts = (codes, scale.name, *([] if zero is None else [zero.name]))
    return Weight(name, shape, parts, by_rows(columns, rows))


def _block(stored: Stored, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    block = settings.get("weight_block_size")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise stored.refuse(f"quantization_config.weight_block_size must be two numbers, found {block!r}")
    return block[0], block[1]

"""NVIDIA ModelOpt: FP8 with one scale a weight; NVFP4, that is E2M1 in blocks of 16 with an E4M3 scale each.

NVFP4: `weight` U8 [out, in / 2], two codes a byte, the low half first; `weight_scale` F8_E4M3 [out, in / 16];
`weight_scale_2` F32, one number. value = code * weight_scale * weight_scale_2.
"""

from collections.abc import Mapping
from typing import Any

from solera_core.quantised.codes import fp4
from solera_core.quantised.fp8 import fp8
from solera_core.quantised.grid import Grid, grid_of
from solera_core.quantised.parts import Float32, Scheme, Stored, Weight, by_rows

__all__ = ["modelopt", "nvfp4"]


def modelopt(stored: Stored, settings: Mapping[str, Any]) -> Scheme:
    """quant_method modelopt."""
    algorithm = settings.get("quant_algo") or (settings.get("quantization") or {}).get("quant_algo")
    if algorithm == "FP8":
        scheme = fp8(stored, {})
        return Scheme("modelopt, fp8", scheme.weights, scheme.dropped)
    if algorithm != "NVFP4":
        raise stored.refuse(f"modelopt with quant_algo {algorithm!r} cannot be dequantised (only FP8 and NVFP4)")
    weights: list[Weight] = []
    for name, info in stored.tensors.items():
        if info.dtype != "U8":
            continue
        module = name.removesuffix("weight")
        parts = stored.companions(module, ("weight", "weight_scale", "weight_scale_2"))
        if parts is not None:
            ends = (parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
            weights += nvfp4(stored, name, *ends, divides=False)
    return Scheme("modelopt, nvfp4, blocks of 16", weights, stored.activations())


def nvfp4(stored: Stored, name: str, codes: str, scale: str, whole: str, *, divides: bool) -> list[Weight]:
    """The weight code * scale * whole, or code * (scale / whole) where the number for the whole `divides`."""
    info = stored.tensors[codes]
    shape = (*info.shape[:-1], info.shape[-1] * 2)
    right = [
        stored.expect(scale, dtypes=("F8_E4M3",)),
        stored.expect(whole, dtypes=("F32",)) and _one_number(stored, whole, shape),
    ]
    grids = grid_of(stored, scale, shape, block=(1, 16)), grid_of(stored, whole, shape)
    if not all(right) or grids[0] is None or grids[1] is None:
        return []
    small, large = grids[0], grids[1]
    width, columns = info.shape[-1], shape[-1]

    def rows(first: int, last: int) -> Float32:
        values = fp4(stored.raw(codes, first * width, last * width)).reshape(last - first, columns)
        return values * _product(stored, small, large, first, last, divides=divides)

    return [Weight(name, shape, (codes, scale, whole), by_rows(columns, rows))]


def _one_number(stored: Stored, whole: str, shape: tuple[int, ...]) -> bool:
    if stored.tensors[whole].size in (1, *([shape[0]] if len(shape) > 2 else [])):
        return True
    stored.problem(whole, "expected one number")
    return False


def _product(stored: Stored, small: Grid, large: Grid, first: int, last: int, *, divides: bool) -> Float32:
    whole = large.expanded(stored, first, last)
    scale = small.expanded(stored, first, last)
    return scale / whole if divides else scale * whole

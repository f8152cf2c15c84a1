"""bitsandbytes: 8-bit integers with a scale a row (arXiv 2208.07339), and 4-bit codes of a table (arXiv 2305.14314).

8 bits: `X` I8 [out, in], `X[:-6]SCB` [out]; value = code * SCB / 127.
4 bits: `X` holds two codes a byte, the first in the high half, for the weight flattened; `X.quant_map` the 16 values of
the table; `X.absmax` a scale for every block, itself an 8-bit code where quantised twice: then
absmax = nested_quant_map[code] * nested_absmax[of its block] + nested_offset. Shape and block sizes are JSON text in
`X.quant_state.bitsandbytes__nf4` (or fp4). value = quant_map[code] * absmax.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from solera_core.quantised.codes import table_of_pairs
from solera_core.quantised.grid import Grid, grid_of
from solera_core.quantised.parts import Float32, Scheme, Stored, Weight, by_rows, setting

__all__ = ["bitsandbytes"]

_KINDS: Final = ("nf4", "fp4")
_NESTED: Final = (".nested_absmax", ".nested_quant_map")


def bitsandbytes(stored: Stored, settings: Mapping[str, Any]) -> Scheme:
    """quant_method bitsandbytes."""
    if settings.get("load_in_8bit"):
        return _eight(stored)
    if not settings.get("load_in_4bit"):
        raise stored.refuse("bitsandbytes with neither load_in_8bit nor load_in_4bit cannot be dequantised")
    kind = setting(stored, settings, "bnb_4bit_quant_type", str, "fp4")
    if kind not in _KINDS:
        raise stored.refuse(f"bitsandbytes with bnb_4bit_quant_type {kind!r} cannot be dequantised")
    end = f".quant_state.bitsandbytes__{kind}"
    states = {name.removesuffix(end): name for name in stored.tensors if name.endswith(end)}
    texts = stored.checkpoint.read_small(list(states.values()))
    weights: list[Weight] = []
    for target, state in states.items():
        weights += _four(stored, target, state, texts[state])
    return Scheme(f"bitsandbytes, {kind}", weights)


def _eight(stored: Stored) -> Scheme:
    weights: list[Weight] = []
    for name, info in stored.tensors.items():
        if info.dtype != "I8":
            continue
        parts = stored.companions(name.removesuffix("weight"), ("weight", "SCB"), ("weight_format",))
        scale = None if parts is None else grid_of(stored, parts["SCB"], info.shape)
        if parts is not None and scale is not None:
            read = by_rows(info.shape[-1], partial(_rows, stored, name, scale))
            weights.append(Weight(name, info.shape, tuple(parts.values()), read))
    return Scheme("bitsandbytes, 8 bits", weights)


def _rows(stored: Stored, name: str, scale: Grid, first: int, last: int) -> Float32:
    """Rows [first, last) of 8-bit codes."""
    codes = stored.raw(name, first * scale.columns, last * scale.columns).view(np.int8).astype(np.float32)
    scales = scale.expanded(stored, first, last)
    scales /= 127
    return codes.reshape(last - first, scale.columns) * scales


def _four(stored: Stored, target: str, state: str, text: bytes) -> list[Weight]:
    try:
        found = json.loads(text)
        shape = tuple(int(n) for n in found["shape"])
        block = int(found["blocksize"])
        nested = (
            (int(found["nested_blocksize"]), float(found["nested_offset"])) if "nested_blocksize" in found else None
        )
    except (ValueError, KeyError, TypeError) as e:
        stored.problem(state, f"is not the JSON of a quantisation state ({e!r})")
        return []
    parts = stored.companions(target, ("", ".absmax", ".quant_map"), _NESTED)
    if parts is None:
        return []
    size = math.prod(shape)
    blocks = -(-size // block)
    right = [
        stored.expect(parts[".quant_map"], dtypes=("F32",), shape=(16,)),
        stored.expect(parts[".absmax"], dtypes=("F32",) if nested is None else ("U8",), shape=(blocks,)),
    ]
    if nested is not None:
        if any(end not in parts for end in _NESTED):
            stored.problem(parts[".absmax"], f"has no {' or '.join(target + end for end in _NESTED)} beside it")
            return []
        right.append(stored.expect(parts[_NESTED[0]], dtypes=("F32",), shape=(-(-blocks // nested[0]),)))
        right.append(stored.expect(parts[_NESTED[1]], dtypes=("F32",), shape=(256,)))
    codes = stored.tensors[target]
    if codes.nbytes != -(-size // 2):
        stored.problem(target, f"holds {codes.nbytes} bytes, and {shape} in 4 bits needs {-(-size // 2)}")
        right.append(False)
    if not all(right):
        return []
    item = codes.nbytes // max(codes.size, 1)  # the codes may be stored as numbers of several bytes

    def read(start: int, stop: int) -> Float32:
        table = table_of_pairs(stored.values(parts[".quant_map"]), high_first=True)
        first, last = start // 2 // item, -(-stop // (2 * item))
        values = table[stored.raw(target, first, last)].reshape(-1)[start - first * 2 * item : stop - first * 2 * item]
        if not len(values):
            return values
        low, high = start // block, (stop - 1) // block + 1
        absmax = _absmax(stored, parts, nested, low, high)
        return values * absmax[np.arange(start, stop) // block - low]

    return [Weight(target, shape, (*parts.values(), state), read)]


def _absmax(stored: Stored, parts: Mapping[str, str], nested: tuple[int, float] | None, low: int, high: int) -> Float32:
    """The scales of blocks [low, high)."""
    if nested is None:
        return stored.values(parts[".absmax"], low, high)
    size, offset = nested
    first, last = low // size, (high - 1) // size + 1
    outer = stored.values(parts[_NESTED[0]], first, last)[np.arange(low, high) // size - first]
    codes = stored.raw(parts[".absmax"], low, high)
    return stored.values(parts[_NESTED[1]])[codes] * outer + np.float32(offset)

"""MXFP4 as gpt-oss stores its experts: E2M1 in blocks of 32 along the input, each with an exponent. arXiv 2310.10537.

`X_blocks` U8 [experts, out, in / 32, 16], two codes a byte, the low half first; `X_scales` U8 [experts, out, in / 32]
with e for 2^(e - 127). The weight `X` is their transpose, [experts, in, out], as transformers keeps it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from solera_core.dtypes import to_float32
from solera_core.quantised.codes import fp4
from solera_core.quantised.parts import Float32, Scheme, Stored, Weight, by_rows
from solera_core.quantised.strips import Strips, strip_height

__all__ = ["mxfp4"]

_BLOCK: Final = 32


def mxfp4(stored: Stored, settings: Mapping[str, Any]) -> Scheme:
    """quant_method mxfp4."""
    del settings  # which modules are left as they are is seen in the tensors
    strips = Strips()
    weights: list[Weight] = []
    for name in stored.tensors:
        if not name.endswith("_blocks"):
            continue
        target = name.removesuffix("_blocks")
        parts = stored.companions(target, ("_blocks", "_scales"))
        if parts is None or not stored.expect(name, dtypes=("U8",)):
            continue
        shape = stored.tensors[name].shape
        if len(shape) != 4 or shape[-1] != _BLOCK // 2:
            stored.problem(name, "expected the shape (experts, out, in / 32, 16)")
            continue
        if not stored.expect(parts["_scales"], dtypes=("U8",), shape=shape[:-1]):
            continue
        experts, out, groups, _ = shape
        rows = partial(_rows, stored, strips, target, out, groups * _BLOCK)
        shape, strip = (experts, groups * _BLOCK, out), strip_height(out, _BLOCK) * out
        weights.append(Weight(target, shape, (name, parts["_scales"]), by_rows(out, rows), strip))
    return Scheme("mxfp4, blocks of 32", weights)


def _rows(stored: Stored, strips: Strips, target: str, out: int, inputs: int, first: int, last: int) -> Float32:
    """Rows [first, last) of the weight, those of all experts counted as one."""
    height = strip_height(out, _BLOCK)
    parts: list[Float32] = []
    for expert in range(first // inputs, -(-last // inputs)):
        begin = expert * inputs
        decode = partial(_decode, stored, target, expert, out)
        span = max(first - begin, 0), min(last - begin, inputs)
        parts.append(strips.rows(f"{target}[{expert}]", *span, height, inputs, decode))
    return np.concatenate(parts)


def _decode(stored: Stored, target: str, expert: int, out: int, first: int, last: int) -> Float32:
    """Rows [first, last) of one expert, whole blocks of them: [rows, out]."""
    begin, end = first // _BLOCK, last // _BLOCK
    groups, half = stored.tensors[f"{target}_scales"].shape[-1], _BLOCK // 2
    place = {"begin": expert * out, "count": out}
    codes = stored.columns(f"{target}_blocks", begin * half, end * half, width=groups * half, **place)
    scales = to_float32(stored.columns(f"{target}_scales", begin, end, **place), "F8_E8M0")
    values = fp4(codes).reshape(out, end - begin, _BLOCK) * scales[:, :, None]
    return np.ascontiguousarray(values.reshape(out, last - first).T)

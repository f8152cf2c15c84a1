"""AWQ as AutoAWQ writes it for its GEMM kernel (arXiv 2306.00978): 4-bit integers with a zero point a group.

For a weight [out, in], in words of 32 bits: `qweight` [in, out / 8]; `qzeros` [groups, out / 8]; `scales` [groups,
out]. The eight outputs of a word stand in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
value = scale * (code - zero point).
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from solera_core.quantised.codes import integers
from solera_core.quantised.groups import Codes, Grouped, grouped_weight
from solera_core.quantised.parts import Bytes, Float32, Scheme, Stored, Weight, setting
from solera_core.quantised.strips import Strips

__all__ = ["awq"]

_PLACE: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight outputs stands."""


def awq(stored: Stored, settings: Mapping[str, Any]) -> Scheme:
    """quant_method awq."""
    bits = setting(stored, settings, "bits", int, settings.get("w_bit"))
    group_size = setting(stored, settings, "group_size", int, settings.get("q_group_size"))
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if bits != 4:
        raise stored.refuse(f"awq with {bits} bits cannot be dequantised (only 4)")
    if layout != "gemm":
        raise stored.refuse(f"awq in the layout {layout!r} cannot be dequantised (only gemm)")
    strips = Strips()
    weights: list[Weight] = []
    for name in stored.tensors:
        if name.endswith(".qweight"):
            weights += _weight(stored, strips, name.removesuffix("qweight"), group_size)
    groups = "one group a row" if group_size == -1 else f"groups of {group_size}"
    return Scheme(f"awq, {bits} bits, {groups}", weights)


def _weight(stored: Stored, strips: Strips, module: str, group_size: int) -> list[Weight]:
    parts = stored.companions(module, ("qweight", "qzeros", "scales"))
    if parts is None or not stored.expect(parts["qweight"], dtypes=("I32",)):
        return []
    inputs, words = stored.matrix(parts["qweight"])
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    right = [
        stored.expect(parts["scales"], dtypes=("F16", "BF16", "F32"), shape=(groups, words * 8)),
        stored.expect(parts["qzeros"], dtypes=("I32",), shape=(groups, words)),
    ]
    if not all(right):
        return []
    weight = Grouped(module, words * 8, inputs, size, 8, None, _codes(stored, module))
    return [grouped_weight(stored, strips, weight, tuple(parts.values()))]


def _codes(stored: Stored, module: str) -> Codes:
    def read(first: int, last: int) -> tuple[Float32, Float32]:
        weight = _unpack(stored.columns(f"{module}qweight", first // 8, last // 8))
        return np.ascontiguousarray(weight.T), _unpack(stored.columns(f"{module}qzeros", first // 8, last // 8))

    return read


def _unpack(raw: Bytes) -> Float32:
    """[rows, 4 words] bytes as [rows, 8 words] integers, in the order of the outputs."""
    codes = integers(4)[raw].reshape(len(raw), -1, 8)
    return codes[:, :, _PLACE].reshape(len(raw), -1)

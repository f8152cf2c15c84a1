"""compressed-tensors, as llm-compressor writes it: 8 bits as they are, fewer packed, all with a scale.

Plain: `weight` F8_E4M3 or I8 with `weight_scale` for the whole, each row, groups of a row or blocks, perhaps
`weight_zero_point`. Packed: `weight_packed` I32 [out, in / n], n = 32 / bits signed integers a word, offset by
2^(bits - 1), the lowest bits first, with `weight_scale` [out, groups], perhaps `weight_zero_point` [out / n, groups]
packed likewise along the rows, and `weight_g_idx` [in], the group of every input. 4-bit floats: `weight_packed` U8
[out, in / 2], two E2M1 codes a byte, as NVFP4 (with `weight_global_scale`, which the scales are divided by) or MXFP4
(the scale a byte e for 2^(e - 127)).
value = (code - zero point) * scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solera_core.quantised.codes import integers
from solera_core.quantised.fp8 import F8, scaled
from solera_core.quantised.grid import grid_of
from solera_core.quantised.modelopt import nvfp4
from solera_core.quantised.parts import Float32, Scheme, Stored, Weight, by_rows

__all__ = ["compressed_tensors"]

_LAYOUTS: Final = (
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
)
_BITS: Final = (2, 4, 8)


def compressed_tensors(stored: Stored, settings: Mapping[str, Any]) -> Scheme:
    """quant_method compressed-tensors."""
    layout = settings.get("format")
    if layout not in _LAYOUTS:
        raise stored.refuse(f"compressed-tensors in the layout {layout!r} cannot be dequantised")
    if settings.get("quantization_status", "compressed") != "compressed":
        raise stored.refuse(f"quantization_status {settings['quantization_status']!r}: the weights are not compressed")
    if (sparsity := (settings.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise stored.refuse(f"sparse weights ({sparsity}) cannot be read")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise stored.refuse("weights with transforms (`transform_config`) cannot be dequantised")
    arguments = _arguments(settings)
    weights: list[Weight] = []
    for name, info in stored.tensors.items():
        if name.endswith(".weight_packed"):
            weights += _packed(stored, name.removesuffix("weight_packed"), arguments)
        elif info.dtype in (*F8, "I8") and name.endswith(".weight"):
            weights += _plain(stored, name.removesuffix("weight"))
    return Scheme(f"compressed-tensors, {layout}", weights, stored.activations())


def _arguments(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How integers are packed: the arguments of every group of modules that has them."""
    groups = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
    return [group for group in groups if group.get("type", "int") == "int" and "num_bits" in group]


def _plain(stored: Stored, module: str) -> list[Weight]:
    parts = stored.companions(module, ("weight", "weight_scale"), ("weight_zero_point",))
    if parts is None:
        return []
    codes = parts["weight"]
    shape = stored.tensors[codes].shape
    scale = grid_of(stored, parts["weight_scale"], shape)
    zero = grid_of(stored, parts["weight_zero_point"], shape, integers=True) if "weight_zero_point" in parts else None
    if scale is None or (zero is None and "weight_zero_point" in parts):
        return []
    return [scaled(stored, codes, codes, shape, scale, zero)]


def _packed(stored: Stored, module: str, arguments: Sequence[Mapping[str, Any]]) -> list[Weight]:
    codes, name = f"{module}weight_packed", f"{module}weight"
    if stored.tensors[codes].dtype == "U8":
        if f"{module}weight_global_scale" in stored.tensors:
            parts = stored.companions(module, ("weight_packed", "weight_scale", "weight_global_scale"))
            return [] if parts is None else nvfp4(stored, name, *parts.values(), divides=True)
        parts = stored.companions(module, ("weight_packed", "weight_scale"))
        if parts is None:
            return []
        rows, half = stored.matrix(codes)
        shape = (rows, 2 * half)
        scale = grid_of(stored, parts["weight_scale"], shape, block=(1, 32), exponents=True)
        return [] if scale is None else [scaled(stored, name, codes, shape, scale, packed=True)]
    parts = stored.companions(
        module, ("weight_packed", "weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx")
    )
    if parts is None or not stored.expect(codes, dtypes=("I32",)):
        return []
    bits = {group["num_bits"] for group in arguments}
    if len(bits) != 1 or not bits <= set(_BITS):
        found = ", ".join(map(str, sorted(bits))) or "none given"
        raise stored.refuse(
            f"packed integers of one width out of {', '.join(map(str, _BITS))} bits can be dequantised (found: {found})"
        )
    sizes = {group.get("group_size") for group in arguments}
    weight = _integers(stored, module, parts, bits.pop(), sizes.pop() if len(sizes) == 1 else None)
    if weight is None:
        return []
    read = by_rows(weight.columns, partial(weight.values, stored))
    return [Weight(name, (weight.rows, weight.columns), tuple(parts.values()), read)]


def _integers(
    stored: Stored, module: str, parts: Mapping[str, str], bits: int, group_size: int | None
) -> "_Integers | None":
    rows, words = stored.matrix(parts["weight_packed"])
    columns, scale = words * 32 // bits, stored.tensors[parts["weight_scale"]]
    groups = 1 if scale.size == 1 else scale.shape[-1] if len(scale.shape) == 2 else 1
    right = [
        scale.size == 1 or stored.expect(parts["weight_scale"], shape=(rows, groups)),
        stored.expect(parts["weight_scale"], dtypes=("BF16", "F16", "F32")),
    ]
    if isinstance(group_size, int) and 0 < group_size != columns / groups:
        stored.problem(parts["weight_scale"], f"expected one for every {group_size} of {columns} in a row")
        right.append(False)
    elif columns % groups:
        stored.problem(parts["weight_scale"], f"does not divide rows of {columns} evenly")
        right.append(False)
    if (zero := parts.get("weight_zero_point")) is not None:
        right.append(stored.expect(zero, dtypes=("I32",), shape=(-(-rows * bits // 32), groups)))
    if (g_idx := parts.get("weight_g_idx")) is not None:
        right.append(stored.expect(g_idx, dtypes=("I32",), shape=(columns,)))
    return _Integers(module, rows, columns, groups, bits, scale.size == 1, zero, g_idx) if all(right) else None


@dataclass(frozen=True)
class _Integers:
    """A weight [rows, columns] of packed integers."""

    module: str
    rows: int
    columns: int
    groups: int
    bits: int
    one_scale: bool
    zero: str | None
    g_idx: str | None

    def values(self, stored: Stored, first: int, last: int) -> Float32:
        """Rows [first, last)."""
        self._check_shape(stored)
        table, n = integers(self.bits, 1 << self.bits - 1), last - first
        words = self.columns * self.bits // 32
        codes = table[stored.raw(f"{self.module}weight_packed", first * words, last * words)].reshape(n, -1)
        group = self._group(stored)
        if self.zero is not None:
            codes = codes - self._zeros(stored, first, last)[:, group]
        if self.one_scale:
            return codes * stored.values(f"{self.module}weight_scale")
        scales = stored.values(f"{self.module}weight_scale", first * self.groups, last * self.groups)
        return codes * scales.reshape(n, self.groups)[:, group]

    def _zeros(self, stored: Stored, first: int, last: int) -> Float32:
        """Zero points of rows [first, last): [rows, groups]."""
        assert self.zero is not None
        per_word = 32 // self.bits
        low, high = first // per_word, -(-last // per_word)
        raw = stored.raw(self.zero, low * self.groups, high * self.groups).reshape(high - low, self.groups, 4)
        codes = integers(self.bits, 1 << self.bits - 1)[raw].reshape(high - low, self.groups, per_word)
        rows = codes.transpose(0, 2, 1).reshape(-1, self.groups)
        return rows[first - low * per_word : last - low * per_word]

    def _group(self, stored: Stored) -> npt.NDArray[np.int64]:
        if self.g_idx is not None:
            found = stored.raw(self.g_idx).view("<i4").astype(np.int64)
            if (found != -1).any():  # all -1: the groups come in order
                if found.min() < 0 or found.max() >= self.groups:
                    raise stored.broken(self.g_idx, f"holds a group outside 0 to {self.groups - 1}")
                return found
        return np.arange(self.columns) // (self.columns // self.groups)

    def _check_shape(self, stored: Stored) -> None:
        """The header cannot tell how much of the last word is padding."""
        name = f"{self.module}weight_shape"
        found = stored.raw(name).view("<i8" if stored.tensors[name].dtype == "I64" else "<i4").tolist()
        if found != [self.rows, self.columns]:
            raise stored.broken(name, f"says {found}, but {self.module}weight_packed holds {[self.rows, self.columns]}")

"""GPTQ as AutoGPTQ and GPTQModel write it (arXiv 2210.17323): integers of 2, 4 or 8 bits with a zero point a group.

For a weight [out, in], in words of 32 bits, the lowest bits first:
`qweight` [in / n, out] with n = 32 / bits inputs a word; `qzeros` [groups, out / n]; `scales` [groups, out]; `g_idx`
[in], the group of every input (absent: they come in order). value = scale * (code - zero point).

The first version of the format stores zero points less one, the second (`checkpoint_format: gptq_v2`) as they are. The
one is added to whole words, carries included, as GPTQModel does it: it subtracts in the same way.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from solera_core.quantised.codes import integers
from solera_core.quantised.groups import Codes, Grouped, grouped_weight
from solera_core.quantised.parts import Float32, Scheme, Stored, Weight, setting
from solera_core.quantised.strips import Strips

__all__ = ["gptq"]

_BITS: Final = (2, 4, 8)
_FORMATS: Final = ("gptq", "gptq_v2")


def gptq(stored: Stored, settings: Mapping[str, Any]) -> Scheme:
    """quant_method gptq."""
    bits = setting(stored, settings, "bits", int)
    group_size = setting(stored, settings, "group_size", int)
    version = setting(stored, settings, "checkpoint_format", str, settings.get("format", "gptq"))
    if bits not in _BITS:
        raise stored.refuse(f"gptq with {bits} bits cannot be dequantised (only {', '.join(map(str, _BITS))})")
    if version not in _FORMATS:
        raise stored.refuse(f"gptq in the layout {version!r} cannot be dequantised (only {', '.join(_FORMATS)})")
    for module, own in (settings.get("dynamic") or {}).items():
        if not str(module).startswith("-:") and own:
            raise stored.refuse(f"gptq with settings of its own for {module!r} (`dynamic`) cannot be dequantised")
    strips = Strips()
    weights: list[Weight] = []
    for name in stored.tensors:
        if name.endswith(".qweight"):
            module = name.removesuffix("qweight")
            weights += _weight(stored, strips, module, bits, group_size, plus_one=version == "gptq")
    groups = "one group a row" if group_size == -1 else f"groups of {group_size}"
    return Scheme(f"{version}, {bits} bits, {groups}", weights)


def _weight(stored: Stored, strips: Strips, module: str, bits: int, group_size: int, *, plus_one: bool) -> list[Weight]:
    parts = stored.companions(module, ("qweight", "qzeros", "scales"), ("g_idx",))
    if parts is None or not stored.expect(parts["qweight"], dtypes=("I32",)):
        return []
    per_word = 32 // bits
    words, out = stored.matrix(parts["qweight"])
    inputs = words * per_word
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    right = [
        stored.expect(parts["scales"], dtypes=("F16", "BF16", "F32"), shape=(groups, out)),
        stored.expect(parts["qzeros"], dtypes=("I32",), shape=(groups, -(-out // per_word))),
        "g_idx" not in parts or stored.expect(parts["g_idx"], dtypes=("I32",), shape=(inputs,)),
    ]
    if not all(right):
        return []
    codes = _codes(stored, module, bits, plus_one=plus_one)
    weight = Grouped(module, out, inputs, size, per_word, parts.get("g_idx"), codes)
    return [grouped_weight(stored, strips, weight, tuple(parts.values()))]


def _codes(stored: Stored, module: str, bits: int, *, plus_one: bool) -> Codes:
    table, per_word = integers(bits), 32 // bits
    one = np.uint32(sum(1 << at for at in range(0, 32, bits)))

    def read(first: int, last: int) -> tuple[Float32, Float32]:
        n = last - first
        words = stored.columns(f"{module}qweight", first, last).reshape(-1, n, 4)
        codes = table[words].reshape(-1, n, per_word).transpose(1, 0, 2).reshape(n, -1)
        zeros = stored.columns(f"{module}qzeros", first // per_word, -(-last // per_word)).view("<u4")
        zeros = (zeros + one if plus_one else zeros).view(np.uint8)
        return codes, table[zeros].reshape(len(zeros), -1)[:, :n]

    return read

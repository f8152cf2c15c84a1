"""Families that store a Llama's network otherwise, seen under its names.

Phi-3      q, k, v are one matrix, rows after rows; so are gate and up.
Gemma 1    a norm of weight w multiplies by 1 + w. The sum is kept in float32: at 1 + w, bfloat16 has a step of
1/128, where w itself was stored far more finely.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.headers import TensorInfo
from solera_core.views import Derived, view

__all__ = ["canonical", "is_folded", "stored_shapes"]

Shapes = Mapping[str, tuple[int, ...]]

_PHI3: Final = {
    "self_attn.q_proj.weight": "self_attn.qkv_proj.weight",
    "self_attn.k_proj.weight": "self_attn.qkv_proj.weight",
    "self_attn.v_proj.weight": "self_attn.qkv_proj.weight",
    "mlp.gate_proj.weight": "mlp.gate_up_proj.weight",
    "mlp.up_proj.weight": "mlp.gate_up_proj.weight",
}


def stored_shapes(family: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors that a family stores for a network with these tensors under a Llama's names."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        home = _home(family, name)
        rows = shape[0] + (found[home][0] if home in found else 0)
        found[home] = (rows, *shape[1:])
    return found


def canonical(checkpoint: Checkpoint, family: str, shapes: Shapes) -> Checkpoint:
    """The model under a Llama's names; itself where those are its own.

    Args:
        checkpoint: as stored, with all of `stored_shapes(family, shapes)`.
        family: its model_type.
        shapes: of the tensors under a Llama's names, in order.
    """
    if family == "phi3":
        return view(checkpoint, _split(checkpoint, shapes), what={"split": "phi3"})
    if family == "gemma":
        folded: dict[str, str | Derived] = {
            name: _plus_one(checkpoint, name) if is_folded(family, name) else name for name in shapes
        }
        return view(checkpoint, folded, what={"folded": "gemma"})
    return checkpoint


def is_folded(family: str, name: str) -> bool:
    """Whether a tensor's value is not the stored one but computed from it; it then stays float32 in any output."""
    return family == "gemma" and name.endswith("norm.weight")


def _home(family: str, name: str) -> str:
    if family == "phi3" and name.startswith("model.layers."):
        *layer, suffix = name.split(".", 3)
        return ".".join([*layer, _PHI3.get(suffix, suffix)])
    return name


def _split(checkpoint: Checkpoint, shapes: Shapes) -> dict[str, str | Derived]:
    found: dict[str, str | Derived] = {}
    used: dict[str, int] = {}
    for name, shape in shapes.items():
        home = _home("phi3", name)
        if home == name:
            found[name] = name
            continue
        info = checkpoint.tensors[home]
        found[name] = Derived(_reshaped(info, shape), partial(_rows, checkpoint, home, used.get(home, 0)))
        used[home] = used.get(home, 0) + math.prod(shape)
    return found


def _rows(checkpoint: Checkpoint, home: str, offset: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    return checkpoint.read_flat(home, offset + start, offset + stop)


def _plus_one(checkpoint: Checkpoint, name: str) -> Derived:
    info = checkpoint.tensors[name]
    return Derived(replace(info, dtype="F32", begin=0, end=4 * info.size), partial(_one_more, checkpoint, name))


def _one_more(checkpoint: Checkpoint, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
    return checkpoint.read_flat(name, start, stop) + np.float32(1)


def _reshaped(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """The same dtype and file; the offsets only say how many bytes the value has."""
    item = info.nbytes // max(info.size, 1)
    return replace(info, shape=shape, begin=0, end=item * math.prod(shape))

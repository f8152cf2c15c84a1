"""A MoE seen with fewer experts: each a copy of one, or the aligned average of several under its leader's router row.

Works for both layouts (see `existing`). Nothing is computed until it is read, so a view costs no memory, and can be
measured before it is written.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.digest import json_digest
from solera_core.dtypes import ITEM_BYTES
from solera_core.headers import TensorInfo
from solera_core.views import Derived, view
from solera_merge.moe.size.existing import COUNT_KEYS, Existing, Kind, MoeLayer

__all__ = ["Group", "first_experts", "regrouped"]

Float32 = npt.NDArray[np.float32]
Order = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Experts that become one.

    Attributes:
        members: by index in the original; the first is the leader, whose router row is kept.
        weights: of the average, adding up to 1.
        orders: neuron j of the new expert is the average of neuron `orders[m][j]` of member m; None: neuron j itself.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    orders: tuple[Order | None, ...] = (None,)

    @property
    def alone(self) -> bool:
        """A copy of one expert."""
        return len(self.members) == 1


def first_experts(model: Existing, keep: int) -> list[list[Group]]:
    """The first `keep` experts of every layer: what a plan needs, which knows shapes only."""
    return [[Group((e,)) for e in range(keep)] for _ in model.layers]


def regrouped(model: Existing, groups: Sequence[Sequence[Group]]) -> Checkpoint:
    """The MoE whose experts are these groups, layer by layer, in the layout of the original.

    Args:
        model: the original.
        groups: of every sparse layer, equally many.
    """
    checkpoint, keep = model.checkpoint, len(groups[0])
    seen: dict[str, str | Derived | None] = {}
    for layer, of_layer in zip(model.layers, groups, strict=True):
        seen |= _layer_view(checkpoint, layer, of_layer)
    tensors = {
        name: source for name in checkpoint.tensors if (source := seen.get(name, name)) is not None
    }  # in the original's order
    config = checkpoint.config
    config |= {key: keep for key in COUNT_KEYS if key in config}
    what = json_digest({"groups": [[[g.members, g.weights, g.orders] for g in of_layer] for of_layer in groups]})
    return view(checkpoint, tensors, what={"experts": keep, "groups": what}, config=config)


def _layer_view(checkpoint: Checkpoint, layer: MoeLayer, groups: Sequence[Group]) -> dict[str, str | Derived | None]:
    """What stands under each name of a layer; None: nothing does any more."""
    router = checkpoint.tensors[layer.router]
    leaders = Group(tuple(group.members[0] for group in groups))
    rows = partial(_gather, checkpoint, layer.router, router.shape[1], leaders.members)
    seen: dict[str, str | Derived | None] = {layer.router: Derived(_resized(router, len(groups)), rows)}
    for kind, names in layer.experts.items():
        if layer.fused:
            info = checkpoint.tensors[names[0]]
            parts = [
                _Averaged(checkpoint, kind, [names[0]] * len(g.members), g.members, info.shape[1:], g) for g in groups
            ]
            seen[names[0]] = Derived(_resized(info, len(groups)), _Fused(parts, info.size // info.shape[0]))
            continue
        for e, name in enumerate(names):
            if e >= len(groups):
                seen[name] = None
            elif groups[e].alone:
                seen[name] = names[groups[e].members[0]]
            else:
                group, info = groups[e], checkpoint.tensors[name]
                of = [names[member] for member in group.members]
                seen[name] = Derived(info, _Averaged(checkpoint, kind, of, [0] * len(of), info.shape, group))
    return seen


class _Averaged:
    """One matrix of one new expert. The value is computed whole, kept while it is read in pieces, then let go."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kind: Kind,
        names: Sequence[str],
        places: Sequence[int],
        shape: tuple[int, ...],
        group: Group,
    ) -> None:
        self._checkpoint, self._shape, self._group = checkpoint, shape, group
        self._kind: Kind = kind
        self._names, self._places = tuple(names), tuple(places)
        self._size = int(np.prod(shape))
        self._value: Float32 | None = None
        self._lock = threading.Lock()

    def __call__(self, start: int, stop: int) -> Float32:
        if self._group.alone:
            at = self._places[0] * self._size
            return self._checkpoint.read_flat(self._names[0], at + start, at + stop)
        with self._lock:
            value = self._value = self._average() if self._value is None else self._value
            if stop == self._size:
                self._value = None
        return value[start:stop].copy()

    def _average(self) -> Float32:
        total = np.zeros(self._shape, np.float32)
        for name, place, weight, order in zip(
            self._names, self._places, self._group.weights, self._group.orders, strict=True
        ):
            at = place * self._size
            matrix = self._checkpoint.read_flat(name, at, at + self._size).reshape(self._shape)
            total += np.float32(weight) * _reordered(matrix, self._kind, order)
        return total.reshape(-1)


class _Fused:
    """All new experts of a layer in one tensor."""

    def __init__(self, parts: Sequence[_Averaged], size: int) -> None:
        self._parts, self._size = parts, size

    def __call__(self, start: int, stop: int) -> Float32:
        values = np.empty(stop - start, np.float32)
        for e, first, last in _overlaps(self._size, start, stop):
            at = e * self._size + first - start
            values[at : at + last - first] = self._parts[e](first, last)
        return values


def _reordered(matrix: Float32, kind: Kind, order: Order | None) -> Float32:
    """The matrix with its neurons in another order: rows of what goes in, columns of what goes out."""
    if order is None:
        return matrix
    neurons = np.asarray(order)
    rows = np.concatenate([neurons, len(neurons) + neurons]) if kind == "gate_up" else neurons
    found: Float32 = matrix[:, neurons] if kind == "down" else matrix[rows]
    return found


def _gather(checkpoint: Checkpoint, name: str, size: int, order: Sequence[int], start: int, stop: int) -> Float32:
    """Elements [start, stop) of the blocks of `size` elements of a tensor, put into another order."""
    values = np.empty(stop - start, np.float32)
    for e, first, last in _overlaps(size, start, stop):
        at, here = order[e] * size, e * size + first - start
        values[here : here + last - first] = checkpoint.read_flat(name, at + first, at + last)
    return values


def _overlaps(size: int, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
    """(block, first, last) of every block of `size` elements that [start, stop) touches; offsets within the block."""
    for block in range(start // size, -(-stop // size)):
        yield block, max(start - block * size, 0), min(stop - block * size, size)


def _resized(info: TensorInfo, count: int) -> TensorInfo:
    shape = (count, *info.shape[1:])
    return replace(info, shape=shape, begin=0, end=int(np.prod(shape)) * ITEM_BYTES[info.dtype])

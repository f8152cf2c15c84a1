"""Dense models whose feed-forward networks are put together, neuron by neuron, out of those of others.

A neuron is a row of gate_proj, the same row of up_proj, and the column of down_proj. What a network computes does not
depend on the order of its neurons, so experts can be taken apart and put together again.

    F width of a feed-forward network, D model width
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.headers import TensorInfo
from solera_core.views import Derived, view
from solera_merge.moe.canonical import stored_shapes
from solera_merge.moe.dense import FFN, Dense, dense_shapes, is_ffn

__all__ = ["Group", "Refitted", "averaged", "compose", "every_neuron", "split"]

Float32: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Refitted:
    """Output matrices (D, n) of a group's neurons, one a layer, float32 in a raw file."""

    path: Path
    width: int

    def read(self, layer: int, rows: int, start: int, stop: int) -> Float32:
        """Rows [start, stop) of a layer's matrix of `rows` rows: (stop - start, n)."""
        count = (stop - start) * self.width
        offset = 4 * self.width * (layer * rows + start)
        return np.fromfile(self.path, dtype=np.float32, count=count, offset=offset).reshape(stop - start, self.width)


@dataclass(frozen=True)
class Group:
    """Some neurons of a model.

    Attributes:
        model: that has them.
        neurons: which, of every layer: equally many, ascending.
        scale: factor on what they add.
        down: their output matrices where those are not the model's.
    """

    model: Dense
    neurons: Sequence[npt.NDArray[np.intp]]
    scale: float = 1.0
    down: Refitted | None = None

    @property
    def width(self) -> int:
        """How many of a layer."""
        return len(self.neurons[0])


def every_neuron(model: Dense) -> list[npt.NDArray[np.intp]]:
    """All neurons of every layer."""
    return [np.arange(model.width)] * model.layers


def split(own: Dense, routed: Group, shared: Group) -> Dense:
    """A model whose neurons are these, and which knows which of them go into a shared expert."""
    whole = compose(own, [routed, shared])
    return replace(whole, split=(compose(own, [routed]), compose(own, [shared])))


def compose(own: Dense, groups: Sequence[Group]) -> Dense:
    """A model whose feed-forward networks have the neurons of these groups, one after the other, and which is `own` in
    all else.
    """
    fields = {**own.fields, "intermediate_size": sum(group.width for group in groups)}
    derived = {
        name: _derived(own.checkpoint, name, shape, groups)
        for name, shape in dense_shapes(fields).items()
        if is_ffn(name)
    }

    def seen(checkpoint: Checkpoint, made: dict[str, Derived]) -> Checkpoint:
        tensors: dict[str, str | Derived] = {name: name for name in checkpoint.tensors if not is_ffn(name)}
        config = checkpoint.config | {"intermediate_size": fields["intermediate_size"]}
        return view(checkpoint, {**tensors, **made}, what={"neurons": fields["intermediate_size"]}, config=config)

    stored = seen(own.stored, _as_stored(own, dense_shapes(fields), derived))
    checkpoint = stored if own.checkpoint is own.stored else seen(own.checkpoint, derived)
    return Dense(own.name, stored, checkpoint, own.family, fields)


def averaged(models: Sequence[Dense]) -> Dense:
    """The first model with the mean of all models' feed-forward networks."""
    first = models[0]
    tensors: dict[str, str | Derived] = {
        name: Derived(info, partial(_mean, [model.checkpoint for model in models], name)) if is_ffn(name) else name
        for name, info in first.checkpoint.tensors.items()
    }
    # Only groups are taken of it, and those read `checkpoint`.
    return replace(first, checkpoint=view(first.checkpoint, tensors, what={"mean of": [m.name for m in models]}))


def _mean(checkpoints: Sequence[Checkpoint], name: str, start: int, stop: int) -> Float32:
    total = np.zeros(stop - start, dtype=np.float64)  # the mean of equal numbers is that number
    for checkpoint in checkpoints:
        total += checkpoint.read_flat(name, start, stop)
    mean: Float32 = (total / len(checkpoints)).astype(np.float32)
    return mean


def _derived(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], groups: Sequence[Group]) -> Derived:
    read = partial(_columns if name.endswith(FFN[2]) else _rows, name, groups)
    return Derived(_info(checkpoint.tensors[name], shape), partial(_flat, read, shape[1]))


def _flat(read: Any, columns: int, start: int, stop: int) -> Float32:
    """Elements of a matrix that is read by whole rows."""
    first = start // columns
    rows: Float32 = read(first, -(-stop // columns))
    return rows.reshape(-1)[start - first * columns : stop - first * columns].copy()


def _rows(name: str, groups: Sequence[Group], first: int, last: int) -> Float32:
    """Rows of gate_proj or up_proj: neurons [first, last)."""
    found: list[Float32] = []
    before = 0
    layer = int(name.split(".")[2])
    for group in groups:
        wanted = group.neurons[layer][max(first - before, 0) : max(last - before, 0)]
        before += group.width
        if len(wanted):
            checkpoint = group.model.checkpoint
            columns = checkpoint.tensors[name].shape[1]
            low, high = int(wanted[0]), int(wanted[-1]) + 1
            block = checkpoint.read_flat(name, low * columns, high * columns).reshape(-1, columns)
            found.append(block[wanted - low])
    return np.concatenate(found)


def _columns(name: str, groups: Sequence[Group], first: int, last: int) -> Float32:
    """Rows [first, last) of down_proj, with a column for every neuron."""
    found: list[Float32] = []
    layer = int(name.split(".")[2])
    for group in groups:
        info = group.model.checkpoint.tensors[name]
        rows, columns = info.shape
        if group.down is not None:
            block = group.down.read(layer, rows, first, last)
        else:
            read = group.model.checkpoint.read_flat(name, first * columns, last * columns)
            block = read.reshape(-1, columns)[:, group.neurons[layer]]
        found.append(block * np.float32(group.scale))
    return np.concatenate(found, axis=1)


def _as_stored(own: Dense, shapes: dict[str, tuple[int, ...]], derived: dict[str, Derived]) -> dict[str, Derived]:
    """The same under the family's own names: Phi-3 has gate_proj and up_proj in one matrix, row after row."""
    if own.family != "phi3":
        return derived
    found: dict[str, Derived] = {}
    for home, shape in stored_shapes("phi3", shapes).items():
        if home in derived:
            found[home] = derived[home]
        elif is_ffn(home):
            parts = [derived[home.replace("gate_up_proj", half)] for half in ("gate_proj", "up_proj")]
            found[home] = Derived(_info(own.stored.tensors[home], shape), partial(_joined, parts))
    return found


def _joined(parts: Sequence[Derived], start: int, stop: int) -> Float32:
    found: list[Float32] = []
    before = 0
    for part in parts:
        low, high = max(start - before, 0), min(stop - before, part.info.size)
        before += part.info.size
        if low < high:
            found.append(part.read(low, high))
    return np.concatenate(found)


def _info(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    item = info.nbytes // max(info.size, 1)
    return replace(info, shape=shape, begin=0, end=item * math.prod(shape))

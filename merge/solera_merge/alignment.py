"""Models under the names of one of them: two layouts of a family, or a language model as a tower of a larger one.

transformers has moved the towers of LLaVA, Gemma 3, Qwen2.5-VL and others about (`language_model.model.layers`,
`model.language_model.layers`, `model.layers` beside `visual.blocks`), and checkpoints of both layouts are around. What
follows a tower's prefix is the same in all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from solera_core.architecture import is_embedding, is_head
from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import FLOATS
from solera_core.errors import CheckpointError
from solera_core.towers import Tower, find_tower
from solera_core.views import Derived, Float32, view

__all__ = ["align", "counterpart", "fill"]


def align(checkpoint: Checkpoint, towers: Sequence[Tower], like: Sequence[Tower]) -> Checkpoint:
    """The model with its tensors named as in a model whose towers are `like`; itself where they are so already.

    A tower is renamed where that lets more of its names agree; else its names stay.
    """
    known = {name for tower in like for name in tower.tensors}
    new = {name: name for name in checkpoint.tensors}
    for tower in towers:
        if known.issuperset(tower.tensors) or (twin := counterpart(tower, like)) is None:
            continue
        renamed = {name: twin.named(tower.canonical(name)) for name in tower.tensors}
        if len(known & set(renamed.values())) > len(known & set(tower.tensors)):
            new |= renamed
    if all(name == old for old, name in new.items()) or len(set(new.values())) < len(new):
        return checkpoint
    names = {name: old for old, name in new.items()}
    return view(checkpoint, names, what={"renamed": {n: old for n, old in names.items() if n != old}})


def counterpart(tower: Tower, among: Sequence[Tower]) -> Tower | None:
    """The same tower in another model: of that name, else of that role; or all of a model that is but one tower."""
    return find_tower(among, tower.name) or find_tower(among, tower.role) or (among[0] if len(among) == 1 else None)


def fill(checkpoint: Checkpoint, own: Tower, whole: Checkpoint, tower: Tower) -> Checkpoint:
    """A model (or one tower of it) as a tower of a larger model: under its names, and with all its rows.

    Where the larger model has more tokens (for its images, say), embedding and head have more rows. The model knows
    nothing of those tokens, so it has the larger one's rows for them.

    Args:
        checkpoint: the model.
        own: its tower (the only one, if it is a language model).
        whole: the larger model.
        tower: the one to be filled.
    """
    tensors: dict[str, str | Derived] = {}
    padded: dict[str, int] = {}
    for old in own.tensors:
        name = tower.named(own.canonical(old))
        tensors[name] = old
        mine, theirs = checkpoint.tensors[old], whole.tensors.get(name)
        looked_up = is_embedding(name) or is_head(name)
        if theirs is None or not looked_up or mine.shape[1:] != theirs.shape[1:] or mine.shape[0] >= theirs.shape[0]:
            continue
        if mine.dtype in FLOATS and theirs.dtype in FLOATS:
            padded[name] = theirs.shape[0] - mine.shape[0]
            tensors[name] = Derived(
                replace(mine, name=name, shape=theirs.shape), partial(_rows, checkpoint, old, whole, name)
            )
    if len(tensors) < len(own.tensors):
        raise CheckpointError(f"{checkpoint.path}: several of its tensors would have one name in {tower.name!r}")
    what: Mapping[str, object] = {"tower": tower.name, "names": list(tensors), "rows": padded}
    return view(checkpoint, tensors, what=what)


def _rows(checkpoint: Checkpoint, old: str, whole: Checkpoint, name: str, start: int, stop: int) -> Float32:
    """Elements of a table whose first rows are those of a model, and whose others are those of a larger one."""
    end = checkpoint.tensors[old].size
    mine = checkpoint.read_flat(old, min(start, end), min(stop, end))
    theirs = whole.read_flat(name, max(start, end), max(stop, end))
    return np.concatenate([mine, theirs])

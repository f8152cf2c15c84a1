"""A MoE as the beginning of a larger one: its trunk and experts out of its files, its router's sums beside them."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo
from solera_core.output import InputRecord
from solera_core.provenance import read_provenance
from solera_core.views import Derived, view
from solera_merge.moe.dense import Dense, read_dense
from solera_merge.moe.families import DEFAULTS, resolve
from solera_merge.moe.statistics_file import STATISTICS_FILE, StatisticsReader
from solera_merge.moe.targets.choice import TARGETS
from solera_merge.moe.targets.target import Piece, Target

__all__ = ["Old", "open_old", "trunk_digest"]

_RENAMED: Final = ("phi3", "gemma")
"""Families whose weights lie otherwise in a MoE than in their own files, so that their own model cannot be had back."""


@dataclass(frozen=True)
class Old:
    """A MoE that experts are added to.

    Attributes:
        built: as it lies on disk.
        target: its format.
        names: of its experts.
        trunk: its trunk as a dense model, with the feed-forward networks of its first expert.
        experts: trunk and feed-forward networks of each, as dense models.
        statistics: the sums beside it.
        fit: how its router was made.
        temperature: that its router was divided by.
        record: of it as an input.
    """

    built: Checkpoint
    target: Target
    names: tuple[str, ...]
    trunk: Dense
    experts: tuple[Dense, ...]
    statistics: StatisticsReader
    fit: str
    temperature: float

    def record(self) -> InputRecord:
        """Of the MoE as an input; every byte is hashed."""
        return InputRecord("extended", self.built.ref, self.built.revision, self.built.digest())


def open_old(ref: str, ctx: Context) -> Old:
    """Open a MoE that shall be extended; headers and solera.json alone.

    Raises:
        CheckpointError: it is not one that solera built, its sums are missing or are not those of its weights, or its
            family cannot be read back.
    """
    built = open_checkpoint(ref, ctx)
    record = read_provenance(built.path)
    where = f"extend: {built.path}"
    if record["kind"] != "moe" or built.config.get("model_type") not in TARGETS:
        raise CheckpointError(f"{where}: is not a MoE that `solera moe` built (its kind is {record['kind']!r})")
    if record["recipe"].get("shared"):
        raise CheckpointError(f"{where}: has a shared expert, which a new expert's neurons are not in; build anew")
    target = TARGETS[built.config["model_type"]]
    statistics = StatisticsReader.open(built.path)
    names, about = statistics.experts, statistics.about
    if about.get("weights") != trunk_digest(record["tensors"], target, built):
        raise CheckpointError(
            f"{where}: its weights are not those that {STATISTICS_FILE} was made with (was it trained or healed "
            "since?), so its sums say nothing of what its routers read now; build the larger MoE from the specialists"
        )
    config: dict[str, Any] = about["trunk_config"]
    family = config.get("model_type")
    if family in _RENAMED or family not in DEFAULTS:
        raise CheckpointError(
            f"{where}: its trunk was a {family} model, whose own tensors cannot be read back from a MoE; build the "
            "larger one from the specialists"
        )
    width = _width(built, target)
    config = {**config, "intermediate_size": width}
    fields = resolve(config, family, where)
    pieces = target.pieces(fields, experts=len(names), width=width)
    dense = [
        read_dense(f"expert {name!r}", _as_dense(built, pieces, expert=e, name=name, config=config))
        for e, name in enumerate(names)
    ]
    trunk = read_dense("trunk", _as_dense(built, pieces, expert=0, name="trunk", config=config))
    router = record["checks"]["router"]
    return Old(built, target, names, trunk, tuple(dense), statistics, router["fit"], float(router["temperature"]))


def trunk_digest(digests: Mapping[str, str], target: Target, built: Checkpoint) -> str:
    """One digest over all tensors of a MoE but its routers."""
    routers = {target.router.format(layer=layer) for layer in range(int(built.config["num_hidden_layers"]))}
    kept = {name: digest for name, digest in digests.items() if name not in routers}
    return "sha256:" + hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _width(built: Checkpoint, target: Target) -> int:
    """Of the experts: columns of the matrix that leads out of one."""
    down = f"model.layers.0.{target.slots[2].name.format(e=0)}"
    return built.tensors[down].shape[-1]


def _as_dense(
    built: Checkpoint, pieces: list[Piece], *, expert: int, name: str, config: Mapping[str, Any]
) -> Checkpoint:
    tensors: dict[str, str | Derived] = {}
    for piece in pieces:
        if piece.source is None or piece.expert not in (None, expert):
            continue
        if piece.block == piece.shape:
            tensors[piece.source] = piece.name
        else:  # all experts lie in one tensor
            info = built.tensors[piece.name]
            tensors[piece.source] = Derived(_part_of(info, piece.block), partial(_read, built, piece))
    return view(built, tensors, what={"expert of a MoE": name}, ref=f"{built.ref}#{name}", config=config)


def _part_of(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    item = info.nbytes // max(info.size, 1)
    return TensorInfo(info.name, info.dtype, shape, info.file, 0, item * math.prod(shape))


def _read(built: Checkpoint, piece: Piece, start: int, stop: int) -> npt.NDArray[np.float32]:
    return built.read_flat(piece.name, piece.at + start, piece.at + stop)

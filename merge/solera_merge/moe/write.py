"""Streaming tensors from the inputs into a checkpoint: the MoE itself, and the dense models it is compared with."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import ITEM_BYTES, SAFETENSORS_NAME, from_float32, nonfinite, to_float32
from solera_core.errors import CheckpointError
from solera_core.output import write_metadata
from solera_core.progress import Progress, Silent
from solera_core.writer import CheckpointWriter, TensorSpec
from solera_merge.moe.altered import altered
from solera_merge.moe.canonical import is_folded, stored_shapes
from solera_merge.moe.dense import FFN, Dense, dense_shapes, is_ffn
from solera_merge.moe.targets.choice import target_of
from solera_merge.moe.targets.target import Piece, Sizes, Target

__all__ = [
    "Part",
    "Routers",
    "moe_specs",
    "replace_routers",
    "torch_dtype_name",
    "trunk_tensors",
    "write_dense",
    "write_moe",
    "write_part",
    "write_whole",
]

Routers = Sequence[np.ndarray]
"""One (E, D) matrix a layer."""

_BLOCK: Final = 1 << 22  # elements copied at a time


@dataclass(frozen=True)
class Part:
    """A piece of a model that is a model of its own: for running what is too large to run whole.

    Attributes:
        layers: the layers kept, which become layers 0, 1, ...
        vocabulary: rows kept of embedding and head, from the first.
    """

    layers: Sequence[int]
    vocabulary: int

    def config(self) -> dict[str, Any]:
        """What changes in a config, but for what it says layer by layer."""
        return {"num_hidden_layers": len(self.layers), "vocab_size": self.vocabulary, "pad_token_id": None}

    def fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Resolved fields of the part."""
        types = fields["layer_types"]
        return {**fields, **self.config(), "layer_types": types and [types[layer] for layer in self.layers]}

    def source(self, name: str) -> str:
        """The whole model's name of a tensor of the part."""
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(self.layers[int(parts[2])])
        return ".".join(parts)


@dataclass(frozen=True)
class _Copy:
    """One block of a tensor to be written, and the tensor it comes from (None: `values`).

    `block` is its shape, `at` where it begins; the blocks of one tensor come one after the other.
    """

    spec: TensorSpec
    checkpoint: Checkpoint | None
    source: str
    block: tuple[int, ...]
    at: int = 0
    values: np.ndarray | None = None


def moe_specs(
    target: Target, trunk: Dense, *, experts: int, width: int, dtype: str | None, shared: int = 0
) -> list[TensorSpec]:
    """Every tensor of the MoE with its dtype: `dtype`, or that of the trunk's counterpart (a router: of its layer)."""
    pieces = target.pieces(trunk.fields, experts=experts, width=width, shared=shared)
    first = {piece.name: piece for piece in reversed(pieces)}
    return [
        TensorSpec(piece.name, _dtype_of(trunk, _counterpart(piece), dtype), piece.shape)
        for piece in reversed(first.values())
    ]


def write_moe(
    directory: Path,
    target: Target,
    trunk: Dense,
    experts: Sequence[Dense],
    routers: Routers,
    *,
    top_k: int,
    width: int,
    dtype: str | None,
    part: Part | None = None,
    sidecars: Sequence[Path] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write a MoE with its config and a tokenizer into `directory`; the digest of every tensor.

    Args:
        directory: to write into; it exists.
        target: the format.
        trunk: gives everything that is not an expert or a router.
        experts: their feed-forward networks, padded with zeros to `width`. Where their neurons are split, the first
            one gives the shared expert (it is the same in all).
        routers: (E, D), one for every layer written.
        top_k: experts a token.
        width: of every expert.
        dtype: of everything; None: as the trunk.
        part: of all the models; None: the whole.
        sidecars: tokenizer and other files; None: the trunk's.
        threads: tensors copied at once.
        progress: where to report.

    Raises:
        CheckpointError: a value is NaN, infinite or too large for the dtype.
    """
    fields = part.fields(trunk.fields) if part else trunk.fields
    shared = experts[0].split[1] if experts[0].split else None
    sizes = Sizes(len(experts), top_k, width, shared.width if shared else 0)
    pieces = target.pieces(fields, experts=sizes.experts, width=width, shared=sizes.shared)
    always = _divided(target, shared) if shared else None
    if unused := set(dense_shapes(fields)) - {piece.source for piece in pieces}:
        raise CheckpointError(f"{trunk.name}: {trunk.checkpoint.ref}: {min(unused)} has no home in {target.title}")
    copies: list[_Copy] = []
    for piece in pieces:
        counterpart = _source(part, _counterpart(piece))
        spec = TensorSpec(piece.name, _dtype_of(trunk, counterpart, dtype), piece.shape)
        if piece.source is None:
            zeros = np.zeros(piece.shape, dtype=np.float32)
            values = zeros if piece.zero else np.asarray(routers[int(piece.name.split(".")[2])], dtype=np.float32)
            copies.append(_Copy(spec, None, piece.name, piece.block, values=values))
        else:
            giver = trunk.checkpoint if piece.expert is None else experts[piece.expert].routed.checkpoint
            if piece.shared:
                assert always is not None
                giver = always
            copies.append(_Copy(spec, giver, _source(part, piece.source), piece.block, piece.at))
    digests = _write(directory, copies, threads=threads, progress=progress)
    config = target.config(fields, sizes, dtype=torch_dtype_name(trunk, dtype))
    write_metadata(directory, config=config, sidecars=trunk.checkpoint.sidecars if sidecars is None else sidecars)
    return digests


def write_dense(
    directory: Path,
    trunk: Dense,
    ffn: Dense,
    *,
    like: Dense,
    dtype: str | None,
    part: Part | None = None,
    threads: int | None = None,
) -> None:
    """Write a dense model, as its family stores it, with the trunk of one input and the feed-forward networks of
    another.

    Its config.json is that of `like` as it stands, not what `read_dense` made of it: so a mistake made there cannot
    cancel out when the MoE is compared with this model. Number formats are those that the MoE gets (`like` is its
    trunk).
    """
    fields = {**(part.fields(like.fields) if part else like.fields), "intermediate_size": ffn.width}
    copies: list[_Copy] = []
    for name, shape in stored_shapes(like.family, dense_shapes(fields)).items():
        source = _source(part, name)
        giver = ffn if is_ffn(name) else trunk
        if is_folded(like.family, name):  # keeps its precision in the MoE, so it does here
            stored = giver.stored.tensors[source].dtype
        else:
            stored = SAFETENSORS_NAME[dtype] if dtype is not None else like.stored.tensors[source].dtype
        copies.append(_Copy(TensorSpec(name, stored, shape), giver.stored, source, shape))
    _write(directory, copies, threads=threads, progress=None)
    config = like.stored.config
    config.pop("torch_dtype", None)  # the older name of dtype
    if part is not None:
        config |= part.config()
        if types := config.pop("layer_types", None) or like.fields["layer_types"]:
            config["layer_types"] = [types[layer] for layer in part.layers]
    config |= {"intermediate_size": ffn.width, "dtype": torch_dtype_name(like, dtype)}
    write_metadata(directory, config=config, sidecars=like.checkpoint.sidecars)


def trunk_tensors(
    target: Target, giver: Dense, like: Dense, *, dtype: str | None, part: Part | None
) -> dict[str, np.ndarray]:
    """The trunk of a model as it would be in a MoE whose number formats are those of `like`: by name, float32."""
    fields = part.fields(giver.fields) if part else giver.fields
    found: dict[str, np.ndarray] = {}
    for piece in target.pieces(fields, experts=1, width=giver.width):
        if piece.source is not None and piece.expert is None:
            source = _source(part, piece.source)
            values = giver.checkpoint.read_flat(source, 0, int(np.prod(piece.shape)))
            stored = _dtype_of(like, source, dtype)
            found[piece.name] = to_float32(from_float32(values, stored), stored).reshape(piece.shape)
    return found


def write_part(directory: Path, built: Checkpoint, part: Part) -> None:
    """Write a part of a built MoE from its own files."""
    config = built.config | part.config()
    if types := config.get("layer_types"):
        config["layer_types"] = [types[layer] for layer in part.layers]
    kept = {layer: i for i, layer in enumerate(part.layers)}
    copies: list[_Copy] = []
    for name, info in built.tensors.items():
        parts, shape = name.split("."), info.shape
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept[int(parts[2])])
        elif len(shape) == 2:  # embedding and head
            shape = (part.vocabulary, *shape[1:])
        copies.append(_Copy(TensorSpec(".".join(parts), info.dtype, shape), built, name, shape))
    _write(directory, copies, threads=None, progress=None)
    write_metadata(directory, config=config, sidecars=())


def write_whole(
    directory: Path, checkpoint: Checkpoint, *, threads: int | None, progress: Progress | None
) -> dict[str, str]:
    """Write a checkpoint, most often a view, as it stands into `directory`; the digest of every tensor.

    What is not derived is copied byte for byte.

    Raises:
        CheckpointError: a value is NaN, infinite or too large for its dtype.
    """
    copies = [
        _Copy(TensorSpec(name, info.dtype, info.shape), checkpoint, name, info.shape)
        for name, info in checkpoint.tensors.items()
    ]
    digests = _write(directory, copies, threads=threads, progress=progress)
    write_metadata(directory, config=checkpoint.config, sidecars=checkpoint.sidecars)
    return digests


def replace_routers(checkpoint: Checkpoint, routers: Routers) -> dict[str, str]:
    """Overwrite the routers of a written MoE, in place; their new digests.

    The temperature is chosen by the written model itself, so its routers are known last.

    Raises:
        CheckpointError: a value is NaN, infinite or too large for the dtype.
    """
    digests: dict[str, str] = {}
    target = target_of(checkpoint.config["model_type"])
    for layer, router in enumerate(routers):
        name = target.router.format(layer=layer)
        info = checkpoint.tensors[name]
        raw = from_float32(np.asarray(router, dtype=np.float32), info.dtype)
        if bad := nonfinite(raw, info.dtype):
            raise CheckpointError(f"tensor {name}: {bad} values are not finite in {info.dtype}; choose a wider dtype")
        with info.file.open("r+b") as file:
            file.seek(info.begin)
            file.write(raw.tobytes())
        digests[name] = "blake3:" + blake3(raw.tobytes()).hexdigest()
    return digests


def torch_dtype_name(trunk: Dense, dtype: str | None) -> str:
    """The config's `dtype`: as asked, or that of the trunk's embedding."""
    if dtype is not None:
        return dtype
    stored = trunk.checkpoint.tensors["model.embed_tokens.weight"].dtype
    return next(name for name, short in SAFETENSORS_NAME.items() if short == stored)


def _divided(target: Target, shared: Dense) -> Checkpoint:
    """A shared expert as it must be written, where the format scales what it adds."""
    assert target.shared is not None, f"{target.name} has no shared expert"
    factor = target.shared.factor
    return altered(shared.checkpoint, residual_scale=factor, noise_scale=0, seed=0, name="shared")


def _counterpart(piece: Piece) -> str:
    """The dense tensor whose number format a piece takes."""
    if piece.source is not None:
        return piece.source
    return f"model.layers.{piece.name.split('.')[2]}.{FFN[0]}"


def _dtype_of(trunk: Dense, name: str, dtype: str | None) -> str:
    folded = is_folded(trunk.family, name)
    return SAFETENSORS_NAME[dtype] if dtype is not None and not folded else trunk.checkpoint.tensors[name].dtype


def _source(part: Part | None, name: str) -> str:
    return name if part is None else part.source(name)


def _write(
    directory: Path, copies: Sequence[_Copy], *, threads: int | None, progress: Progress | None
) -> dict[str, str]:
    workers = threads or min(os.cpu_count() or 1, 4)
    tensors = [list(blocks) for _, blocks in groupby(copies, lambda copy: copy.spec.name)]
    total = sum(blocks[0].spec.nbytes for blocks in tensors)
    with (
        CheckpointWriter(directory, [blocks[0].spec for blocks in tensors]) as writer,
        (progress or Silent()).task("writing experts and trunk", total, "bytes") as task,
        ThreadPoolExecutor(workers) as pool,
    ):
        try:
            for written in pool.map(lambda blocks: sum(_copy(writer, copy) for copy in blocks), tensors):
                task.advance(written)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return writer.finish()


def _copy(writer: CheckpointWriter, copy: _Copy) -> int:
    """Write one block, as stored where the formats agree, else through float32. Narrower sources get zeros; of a
    source with more rows the first are taken.
    """
    spec = copy.spec
    if copy.checkpoint is None:
        assert copy.values is not None
        writer.write_flat(spec.name, copy.at, copy.values.reshape(-1))
        return spec.nbytes
    info = copy.checkpoint.tensors[copy.source]
    raw = info.dtype == spec.dtype and not copy.checkpoint.is_derived(copy.source)
    read: Callable[[str, int, int], np.ndarray[Any, Any]] = (
        copy.checkpoint.read_raw if raw else copy.checkpoint.read_flat
    )
    write: Callable[[str, int, Any], None] = writer.write_raw if raw else writer.write_flat
    unit = ITEM_BYTES[spec.dtype] if raw else 1  # array items an element
    rows, columns = _matrix(copy.block)
    own_rows, own_columns = _matrix(info.shape)
    step = max(_BLOCK // max(columns, 1), 1)
    try:
        for row in range(0, rows, step):
            until = min(row + step, rows)
            block: np.ndarray[Any, Any]
            have = max(min(until, own_rows) - row, 0)
            if have == until - row and own_columns == columns:
                block = read(copy.source, row * columns, until * columns)
            else:
                wide = np.zeros((until - row, columns * unit), np.uint8 if raw else np.float32)
                if have:
                    found = read(copy.source, row * own_columns, (row + have) * own_columns)
                    wide[:have, : own_columns * unit] = found.reshape(have, own_columns * unit)
                block = wide.reshape(-1)
            write(spec.name, copy.at + row * columns, block)
    except CheckpointError as e:
        raise CheckpointError(f"{copy.checkpoint.ref}: tensor {copy.source}: {e}") from e
    return rows * columns * ITEM_BYTES[spec.dtype]


def _matrix(shape: Iterable[int]) -> tuple[int, int]:
    first, *rest = shape
    return first, int(np.prod(rest, dtype=np.int64))

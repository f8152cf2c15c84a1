"""Streaming tensors from the inputs into a checkpoint: the MoE itself, and the dense models it is compared with."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import ITEM_BYTES, SAFETENSORS_NAME, from_float32, nonfinite
from solera_core.errors import CheckpointError
from solera_core.output import write_metadata
from solera_core.progress import Progress, Silent
from solera_core.writer import CheckpointWriter, TensorSpec
from solera_merge.moe.dense import FFN, Dense, dense_shapes
from solera_merge.moe.mixtral import ROUTER, Piece, moe_config, pieces

__all__ = [
    "Part",
    "Routers",
    "moe_specs",
    "replace_routers",
    "torch_dtype_name",
    "write_dense",
    "write_moe",
    "write_part",
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
        """What changes in a config (or in resolved fields)."""
        return {"num_hidden_layers": len(self.layers), "vocab_size": self.vocabulary, "pad_token_id": None}

    def source(self, name: str) -> str:
        """The whole model's name of a tensor of the part."""
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(self.layers[int(parts[2])])
        return ".".join(parts)


@dataclass(frozen=True)
class _Copy:
    """One tensor to be written, and the tensor it comes from (None: `values`)."""

    spec: TensorSpec
    checkpoint: Checkpoint | None
    source: str
    values: np.ndarray | None = None


def moe_specs(trunk: Dense, *, experts: int, width: int, dtype: str | None) -> list[TensorSpec]:
    """Every tensor of the MoE with its dtype: `dtype`, or that of the trunk's counterpart (a router: of its layer)."""
    found = pieces(trunk.fields, experts=experts, width=width)
    return [TensorSpec(piece.name, _dtype_of(trunk, _counterpart(piece), dtype), piece.shape) for piece in found]


def write_moe(
    directory: Path,
    trunk: Dense,
    experts: Sequence[Dense],
    routers: Routers,
    *,
    top_k: int,
    width: int,
    dtype: str | None,
    part: Part | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write a MoE with its config and the trunk's tokenizer into `directory`; the digest of every tensor.

    Args:
        directory: to write into; it exists.
        trunk: gives everything that is not an expert or a router.
        experts: their feed-forward networks, padded with zeros to `width`.
        routers: (E, D), one for every layer written.
        top_k: experts a token.
        width: of every expert.
        dtype: of everything; None: as the trunk.
        part: of all the models; None: the whole.
        threads: tensors copied at once.
        progress: where to report.

    Raises:
        CheckpointError: a value is NaN, infinite or too large for the dtype.
    """
    fields = {**trunk.fields, **(part.config() if part else {})}
    copies: list[_Copy] = []
    for piece in pieces(fields, experts=len(experts), width=width):
        counterpart = _source(part, _counterpart(piece))
        spec = TensorSpec(piece.name, _dtype_of(trunk, counterpart, dtype), piece.shape)
        if piece.source is None:
            layer = int(piece.name.split(".")[2])
            copies.append(_Copy(spec, None, piece.name, np.asarray(routers[layer], dtype=np.float32)))
        else:
            giver = trunk if piece.expert is None else experts[piece.expert]
            copies.append(_Copy(spec, giver.checkpoint, _source(part, piece.source)))
    digests = _write(directory, copies, threads=threads, progress=progress)
    config = moe_config(fields, experts=len(experts), top_k=top_k, width=width, dtype=torch_dtype_name(trunk, dtype))
    write_metadata(directory, config=config, sidecars=trunk.checkpoint.sidecars)
    return digests


def write_dense(
    directory: Path,
    trunk: Dense,
    ffn: Dense,
    *,
    like: Dense,
    width: int,
    dtype: str | None,
    part: Part | None = None,
    threads: int | None = None,
) -> None:
    """Write a dense model with the trunk of one input and the feed-forward networks of another.

    Its config.json is that of `like` as it stands, not what `read_dense` made of it: so a mistake made there cannot
    cancel out when the MoE is compared with this model. Number formats are those that the MoE gets (`like` is its
    trunk).
    """
    changed = {**(part.config() if part else {}), "intermediate_size": width}
    fields = {**like.fields, **changed}
    copies: list[_Copy] = []
    for name, shape in dense_shapes(fields).items():
        source = _source(part, name)
        giver = ffn if name.endswith(FFN) else trunk
        copies.append(_Copy(TensorSpec(name, _dtype_of(like, source, dtype), shape), giver.checkpoint, source))
    _write(directory, copies, threads=threads, progress=None)
    config = like.checkpoint.config
    for key in ("torch_dtype", "layer_types"):  # the older name of dtype; and a list as long as the layers were
        config.pop(key, None)
    config |= {**changed, "dtype": torch_dtype_name(like, dtype)}
    write_metadata(directory, config=config, sidecars=like.checkpoint.sidecars)


def write_part(directory: Path, built: Checkpoint, part: Part) -> None:
    """Write a part of a built MoE from its own files."""
    config = built.config | part.config()
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
        copies.append(_Copy(TensorSpec(".".join(parts), info.dtype, shape), built, name))
    _write(directory, copies, threads=None, progress=None)
    write_metadata(directory, config=config, sidecars=())


def replace_routers(checkpoint: Checkpoint, routers: Routers) -> dict[str, str]:
    """Overwrite the routers of a written MoE, in place; their new digests.

    The temperature is chosen by the written model itself, so its routers are known last.

    Raises:
        CheckpointError: a value is NaN, infinite or too large for the dtype.
    """
    digests: dict[str, str] = {}
    for layer, router in enumerate(routers):
        name = ROUTER.format(layer=layer)
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


def _counterpart(piece: Piece) -> str:
    """The dense tensor whose number format a piece takes."""
    if piece.source is not None:
        return piece.source
    return f"model.layers.{piece.name.split('.')[2]}.{FFN[0]}"


def _dtype_of(trunk: Dense, name: str, dtype: str | None) -> str:
    return SAFETENSORS_NAME[dtype] if dtype is not None else trunk.checkpoint.tensors[name].dtype


def _source(part: Part | None, name: str) -> str:
    return name if part is None else part.source(name)


def _write(
    directory: Path, copies: Sequence[_Copy], *, threads: int | None, progress: Progress | None
) -> dict[str, str]:
    workers = threads or min(os.cpu_count() or 1, 4)
    total = sum(copy.spec.nbytes for copy in copies)
    with (
        CheckpointWriter(directory, [copy.spec for copy in copies]) as writer,
        (progress or Silent()).task("writing experts and trunk", total, "bytes") as task,
        ThreadPoolExecutor(workers) as pool,
    ):
        try:
            for written in pool.map(lambda copy: _copy(writer, copy), copies):
                task.advance(written)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return writer.finish()


def _copy(writer: CheckpointWriter, copy: _Copy) -> int:
    """Write one tensor, as stored where the formats agree, else through float32. Narrower sources get zeros; of a
    source with more rows the first are taken.
    """
    spec = copy.spec
    if copy.checkpoint is None:
        assert copy.values is not None
        writer.write_flat(spec.name, 0, copy.values.reshape(-1))
        return spec.nbytes
    info = copy.checkpoint.tensors[copy.source]
    raw = info.dtype == spec.dtype and not copy.checkpoint.is_derived(copy.source)
    read: Callable[[str, int, int], np.ndarray[Any, Any]] = (
        copy.checkpoint.read_raw if raw else copy.checkpoint.read_flat
    )
    write: Callable[[str, int, Any], None] = writer.write_raw if raw else writer.write_flat
    unit = ITEM_BYTES[spec.dtype] if raw else 1  # array items an element
    rows, columns = _matrix(spec.shape)
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
            write(spec.name, row * columns, block)
    except CheckpointError as e:
        raise CheckpointError(f"{copy.checkpoint.ref}: tensor {copy.source}: {e}") from e
    return spec.nbytes


def _matrix(shape: Iterable[int]) -> tuple[int, int]:
    first, *rest = shape
    return first, int(np.prod(rest, dtype=np.int64))

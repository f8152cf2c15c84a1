"""Which files of a directory hold the weights, and whether index and files agree."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo, read_header

__all__ = ["Weights", "find_weights", "join_headers", "read_headers"]

_SAFE: Final = ("model.safetensors", "model.safetensors.index.json")
_PICKLE: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD: Final = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Weights:
    """The weight files of a checkpoint.

    Attributes:
        files: in the order of their names.
        weight_map: the index, tensor name to file name; None where there is a single file without an index.
        index: path of the index.
        pickled: `.bin` files, not safetensors.
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    index: Path | None
    pickled: bool


def find_weights(directory: Path, *, allow_pickle: bool, names: Collection[str] | None = None) -> Weights:
    """The weight files that transformers would read, refusing what is ambiguous or unsafe.

    Args:
        directory: with the index, where there is one.
        allow_pickle: `.bin` files may be read.
        names: of the files that belong to the model, where not all of them are in `directory` yet (None: those there).

    Raises:
        CheckpointError: no weights; only pickled ones and they are not allowed; an index that is damaged, names a
            missing file or one outside the directory; stale shards beside a newer model.
    """
    way_out = "download the model again" if names is None else "the repository is incomplete: choose another revision"
    present = {p.name for p in directory.iterdir() if p.is_file()} if names is None else set(names)
    for candidates, pickled in ((_SAFE, False), (_PICKLE, True)):
        single, index = (directory / name for name in candidates)
        if single.name not in present and index.name not in present:
            continue
        if pickled and not allow_pickle:
            raise CheckpointError(
                f"{single if single.name in present else index}: the weights are pickled, and a pickle can run code "
                "when opened; convert them to safetensors, or "
                "pass --allow-pickle to read them with torch's restricted loader"
            )
        if index.name not in present:
            _refuse_strays(directory, present, {single.name})
            return Weights((single,), None, None, pickled)
        weight_map = _read_index(index)
        listed = sorted(set(weight_map.values()))
        if single.name in present and single.name not in listed:
            raise CheckpointError(
                f"{directory}: holds both {single.name} and {index.name} that does not list it; one of them is left "
                "over from another model: delete the wrong one"
            )
        files = tuple(directory / name for name in listed)
        if absent := [f.name for f in files if f.name not in present]:
            raise CheckpointError(
                f"{index}: lists {', '.join(absent)}, but {'it is' if len(absent) == 1 else 'they are'} not there "
                f"({len(files) - len(absent)} of {len(files)} shards are); {way_out}"
            )
        if not pickled:
            _refuse_strays(directory, present, set(listed))
        return Weights(files, weight_map, index, pickled)
    shards = sorted(name for name in present if fnmatch(name, "model-*-of-*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{directory}: holds shards ({', '.join(shards[:3])}{', ...' if len(shards) > 3 else ''}) "
            f"but no {_SAFE[1]}; {way_out}"
        )
    if "adapter_config.json" in present:
        raise CheckpointError(
            f"{directory}: is a LoRA adapter, not a model; write it as "
            f"<model>+{directory.name}, behind the model it was made for"
        )
    raise CheckpointError(f"{directory}: not a checkpoint: neither {_SAFE[0]} nor {_SAFE[1]}")


def read_headers(weights: Weights) -> dict[str, TensorInfo]:
    """All tensors of safetensors `weights`, in order of (file, offset), headers and index compared.

    Raises:
        CheckpointError: a damaged file, a tensor in two shards, listed but absent, or present but unlisted.
    """
    return join_headers(weights, map(read_header, weights.files))


def join_headers(weights: Weights, headers: Iterable[Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """All tensors of `weights`, whose files have these `headers` in this order, compared with the index.

    Raises:
        CheckpointError: as `read_headers`.
    """
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.items():
            if name in tensors:
                raise CheckpointError(
                    f"{info.file}: tensor {name!r} is also in {tensors[name].file.name}; the shards are of two models"
                )
            tensors[name] = info
    if weights.weight_map is not None:
        compare_index(weights, {name: info.file.name for name, info in tensors.items()})
    return tensors


def compare_index(weights: Weights, found: Mapping[str, str]) -> None:
    """Raise CheckpointError where the index and what the files hold (tensor name to file name) disagree."""
    assert weights.weight_map is not None
    for name, file in weights.weight_map.items():
        if name not in found:
            raise CheckpointError(f"{weights.index}: lists tensor {name!r} in {file}, which does not hold it")
        if found[name] != file:
            raise CheckpointError(f"{weights.index}: lists tensor {name!r} in {file}, but it is in {found[name]}")
    if extra := [name for name in found if name not in weights.weight_map]:
        raise CheckpointError(
            f"{weights.index}: does not list tensor {extra[0]!r} of {found[extra[0]]}"
            f"{f' (nor {len(extra) - 1} more)' if len(extra) > 1 else ''}; index and shards are of two models"
        )


def _read_index(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{index}: cannot be read as JSON: {e}; download it again") from e
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {file!r}, which is not a plain file name; "
                "an index may only name files beside it"
            )
    return weight_map


def _refuse_strays(directory: Path, present: Collection[str], listed: set[str]) -> None:
    strays = sorted(name for name in present if _SHARD.fullmatch(name) and name not in listed)
    if strays:
        raise CheckpointError(
            f"{directory}: {strays[0]} is not part of the model ({', '.join(sorted(listed)[:2])}"
            f"{', ...' if len(listed) > 2 else ''}); it is left over from another one: delete it"
        )

"""LoRA adapters (peft) laid over a model while it is read: W + scaling * B @ A, a few rows at a time.

Equal to peft's `merge_and_unload` in float32. An adapter is refused, by name, when its config asks for anything that
this formula does not cover: DoRA, transposed weights, adapters that changed the base too, every setting unknown here.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.context import Context
from solera_core.digest import json_digest, tensor_digest
from solera_core.dtypes import to_float32
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo
from solera_core.hub import resolve
from solera_core.shards import Weights
from solera_core.sources import Source, open_source
from solera_core.views import Derived, view

__all__ = ["Adapter", "LowRank", "lay_over", "open_adapter"]

Float32 = npt.NDArray[np.float32]

_BLOCK: Final = 1 << 15  # elements of the product worked on at a time: 128 KB of float32, which stays in cache

_UNDERSTOOD: Final = frozenset(
    {  # settings that the formula covers, or that matter in training only
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_INITIALISATIONS: Final = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it was
_LOW_RANK: Final = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")


@dataclass(frozen=True)
class LowRank:
    """One low-rank update of a (rows, columns) matrix: `scaling * left @ right`.

    Attributes:
        left: (rows, rank).
        right: (rank, columns).
        scaling: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    """

    left: Float32
    right: Float32
    scaling: float

    def delta(self, start: int, stop: int) -> Float32:
        """Elements [start, stop) of the update, flat, in C order.

        One rank after the other is multiplied and added, in float32: a matrix product of a BLAS rounds differently for
        other heights and other numbers of threads, and the same inputs must give the same bytes.
        """
        rank, columns = self.right.shape
        out = np.empty(stop - start, dtype=np.float32)
        height = max(1, _BLOCK // columns)
        product = np.empty((height, columns), dtype=np.float32)
        for row in range(start // columns, -(-stop // columns), height):
            left = self.left[row : row + height]
            term = product[: len(left)]
            block = np.zeros_like(term)
            for k in range(rank):
                block += np.multiply(left[:, k : k + 1], self.right[k], out=term)
            block *= np.float32(self.scaling)
            at = row * columns
            first, last = max(start, at), min(stop, at + block.size)
            out[first - start : last - start] = block.reshape(-1)[first - at : last - at]
        return out


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the model it was opened for.

    Attributes:
        ref: as written.
        updates: low-rank updates, by the tensor they change.
        replaced: tensors that the adapter holds in full (`modules_to_save`, biases), by the tensor they replace.
        digest: of its settings and tensors.
        directory: where it is.
    """

    ref: str
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, TensorInfo]
    digest: str
    directory: Path
    _source: Source

    @property
    def names(self) -> frozenset[str]:
        """The tensors it changes."""
        return frozenset(self.updates) | frozenset(self.replaced)

    def apply(self, info: TensorInfo, start: int, stop: int, base: Callable[[int, int], Float32]) -> Float32:
        """Elements [start, stop) of tensor `info` with the adapter; `base(start, stop)` gives those without."""
        if (full := self.replaced.get(info.name)) is not None:
            values = to_float32(self._source.read_raw(full, start, stop), full.dtype)
        else:
            values = base(start, stop)
        if (update := self.updates.get(info.name)) is not None:
            values += update.delta(start, stop)
        return values


def lay_over(model: Checkpoint, adapter_ref: str, ctx: Context, *, ref: str) -> Checkpoint:
    """A model with a peft LoRA adapter laid over it, called `ref`.

    Raises:
        CheckpointError: as `open_adapter`.
    """
    adapter = open_adapter(adapter_ref, model.tensors, ctx)

    def seen(name: str, info: TensorInfo) -> str | Derived:
        if name not in adapter.names:
            return name
        return Derived(info, partial(adapter.apply, info, base=partial(model.read_flat, name)))

    return view(
        model,
        {name: seen(name, info) for name, info in model.tensors.items()},
        what={"adapter": adapter.digest},
        ref=ref,
        directories=(adapter.directory,),
    )


def open_adapter(ref: str, tensors: Mapping[str, TensorInfo], ctx: Context) -> Adapter:
    """Open a peft LoRA adapter for a model with these `tensors`.

    Raises:
        CheckpointError: not found, not a LoRA adapter, a setting that is not supported (named), a tensor that the model
            does not have or of another shape, or anything in the adapter that would be left unused.
    """
    directory = resolve(ref, ctx).path
    settings = _settings(directory)
    source = open_source(_weights(directory, allow_pickle=ctx.allow_pickle))
    halves: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        where = f"{info.file}: tensor {name!r}"
        if "lora_magnitude_vector" in name:
            raise CheckpointError(f"{where}: DoRA adapters are not supported; merge it with peft first")
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if (match := _LOW_RANK.fullmatch(plain)) is not None:
            target = _target(where, match["module"] + ".weight", tensors)
            halves.setdefault(target, {})[(match["embedding"] or "") + match["side"]] = info
        elif ".lora_" in plain:
            raise CheckpointError(f"{where}: this kind of LoRA tensor is not supported; merge it with peft first")
        else:
            target = _target(where, plain.replace(".modules_to_save.", "."), tensors)
            if info.shape != tensors[target].shape:
                raise CheckpointError(
                    f"{where} {info.shape} replaces {target!r} {tensors[target].shape} of the model: the shapes differ "
                    "(was the vocabulary enlarged in training?); merge it with peft first"
                )
            replaced[target] = info
    updates = {t: _low_rank(directory, t, sides, settings, source, tensors[t]) for t, sides in halves.items()}
    if not updates:
        raise CheckpointError(f"{directory}: holds no LoRA tensors")
    digests = {info.name: tensor_digest(info.size, partial(source.read_raw, info)) for info in source.tensors.values()}
    relevant = {k: v for k, v in settings.items() if k not in ("base_model_name_or_path", "peft_version", "revision")}
    return Adapter(ref, updates, replaced, json_digest({"settings": relevant, "tensors": digests}), directory, source)


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / "adapter_config.json"
    if not file.exists():
        raise CheckpointError(f"{directory}: not a peft adapter: it has no adapter_config.json")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON: {e}") from e
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: expected an object, found {type(settings).__name__}")
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type {settings.get('peft_type')!r} is not supported, only LORA")
    if settings.get("use_dora"):
        raise CheckpointError(f"{file}: DoRA adapters (use_dora) are not supported; merge it with peft first")
    if settings.get("fan_in_fan_out"):
        raise CheckpointError(
            f"{file}: fan_in_fan_out (transposed weights, as GPT-2 has them) is not supported; merge it with peft first"
        )
    if settings.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise CheckpointError(
            f"{file}: init_lora_weights {settings['init_lora_weights']!r} changed the base model too, so the adapter "
            "does not fit the original; convert it to a plain LoRA with peft (path_initial_model_for_weight_conversion)"
        )
    for key, value in settings.items():
        if key not in _UNDERSTOOD and value not in (None, False, {}, []):
            raise CheckpointError(f"{file}: `{key}: {value!r}` is not supported; merge it with peft first")
    for key in ("r", "lora_alpha"):
        if isinstance(settings.get(key), bool) or not isinstance(settings.get(key), int | float):
            raise CheckpointError(f"{file}: `{key}` must be a number, found {settings.get(key)!r}")
    return settings


def _weights(directory: Path, *, allow_pickle: bool) -> Weights:
    safe, pickled = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
    if safe.is_file():
        return Weights((safe,), None, None, pickled=False)
    if not pickled.is_file():
        raise CheckpointError(f"{directory}: the adapter has no weights ({safe.name} is missing)")
    if not allow_pickle:
        raise CheckpointError(
            f"{pickled}: the adapter is pickled, and a pickle can run code when opened; convert it to safetensors, "
            "or pass --allow-pickle to read it with torch's restricted loader"
        )
    return Weights((pickled,), None, None, pickled=True)


def _target(where: str, name: str, tensors: Mapping[str, TensorInfo]) -> str:
    if name not in tensors:
        raise CheckpointError(
            f"{where} changes {name!r}, which the model does not store under this name; "
            "is the adapter for another model? If not, merge it with peft first"
        )
    return name


def _low_rank(
    directory: Path,
    target: str,
    sides: Mapping[str, TensorInfo],
    settings: Mapping[str, Any],
    source: Source,
    weight: TensorInfo,
) -> LowRank:
    file = directory / "adapter_config.json"
    embedding = any(side.startswith("embedding") for side in sides)
    wanted = {"embedding_A", "embedding_B"} if embedding else {"A", "B"}
    if sides.keys() != wanted:
        raise CheckpointError(
            f"{directory}: tensor {target!r}: the adapter holds {sorted(sides)}, expected {sorted(wanted)}"
        )
    a, b = ((_matrix(source, sides[side])) for side in sorted(sides))
    # embeddings: A is (rank, vocabulary), B is (width, rank), and the update is transposed
    left, right = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if embedding else (b, a)
    if len(weight.shape) != 2 or (left.shape[0], right.shape[1]) != weight.shape or left.shape[1] != right.shape[0]:
        raise CheckpointError(
            f"{directory}: tensor {target!r} {weight.shape}: the adapter's factors {left.shape} and {right.shape} "
            "do not fit; is the adapter for another model?"
        )
    module = target.removesuffix(".weight")
    rank = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    if rank != left.shape[1]:
        raise CheckpointError(f"{file}: gives rank {rank} for {module}, but its factors have rank {left.shape[1]}")
    scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    return LowRank(left, right, scaling)


def _matrix(source: Source, info: TensorInfo) -> Float32:
    if len(info.shape) != 2:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} {info.shape}: only LoRA of matrices is supported; "
            "merge it with peft first"
        )
    return to_float32(source.read_raw(info, 0, info.size), info.dtype).reshape(info.shape)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """As peft looks them up: the first pattern that matches the end of the module's name from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

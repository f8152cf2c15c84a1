"""What a peft LoRA adapter stores: its settings, one low-rank update a module, and tensors that it holds in full.

    adapter_config.json            r, lora_alpha, patterns of both by module, use_rslora, use_dora, ...
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight [r, in], ....lora_B.weight [out, r], ...

Nothing here knows the base model: `solera_core.adapters` lays an adapter over one. What is not understood is refused by
name, because a setting that is passed over would be a wrong model.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solera_core.context import Context
from solera_core.digest import json_digest, tensor_digest
from solera_core.dtypes import to_float32
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo
from solera_core.hub import resolve
from solera_core.shards import Weights
from solera_core.sources import Source, open_source

__all__ = [
    "CONFIG_FILE",
    "PREFIX",
    "WEIGHTS_FILE",
    "LoraModule",
    "StoredAdapter",
    "is_adapter",
    "open_stored",
    "read_settings",
]

Float32 = npt.NDArray[np.float32]

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
"""What peft puts before the names of the model's own modules."""

_UNDERSTOOD: Final = frozenset(
    {  # settings that the formula covers, or that matter in training only
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
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
        "target_parameters",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
_INITIALISATIONS: Final = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it was
_ABOUT_FILES: Final = ("base_model_name_or_path", "peft_version", "revision")  # says nothing about the values
_WRAPPER: Final = ".base_layer"
_SAVED: Final = ".modules_to_save."
_LOW_RANK: Final = re.compile(
    r"(?P<module>.+)\.lora_((?P<embedding>embedding_)?(?P<side>[AB])(\.(?P<leaf>weight|bias))?"
    r"|(?P<magnitude>magnitude_vector)(\.weight)?)"
)


@dataclass(frozen=True)
class LoraModule:
    """The low-rank update of one module: `scaling * B @ A`.

    Attributes:
        name: of the module in the model that was trained, without peft's wrappers.
        depth: how many wrappers lie outside this one: several parameters of one module (fused experts) have one each.
        a: [rank, in] as stored; of fused experts [experts * rank, in]; of an embedding [rank, vocabulary].
        b: [out, rank]; of fused experts [out, rank * experts]; of an embedding [width, rank].
        embedding: the update is transposed: A^T B^T.
        magnitude: DoRA's norms (arXiv 2402.09353), [out].
        bias: of B, [out]; scaled and added to the module's bias (`lora_bias`).
    """

    name: str
    depth: int
    a: TensorInfo
    b: TensorInfo
    embedding: bool
    magnitude: TensorInfo | None
    bias: TensorInfo | None


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's content, without a base.

    Attributes:
        ref: as written.
        directory: where it is.
        revision: the hub commit, where it came from the hub.
        settings: adapter_config.json.
        modules: its low-rank updates.
        full: tensors held in full (`modules_to_save`, biases, embeddings), by their name in the model.
    """

    ref: str
    directory: Path
    revision: str | None
    settings: Mapping[str, Any]
    modules: tuple[LoraModule, ...]
    full: Mapping[str, TensorInfo]
    source: Source

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Float32:
        """Elements [start, stop) of a stored tensor, flat float32, a new array."""
        return to_float32(self.source.read_raw(info, start, info.size if stop is None else stop), info.dtype)

    def matrix(self, info: TensorInfo) -> Float32:
        """A stored matrix, [rows, columns] float32."""
        return self.read(info).reshape(info.shape)

    def rank(self, place: str) -> int:
        """The rank that the settings give a module, or a parameter, of this name."""
        return int(_by_pattern(self.settings.get("rank_pattern"), place, self.settings["r"]))

    def alpha(self, place: str) -> float:
        """The alpha that the settings give a module, or a parameter, of this name."""
        return float(_by_pattern(self.settings.get("alpha_pattern"), place, self.settings["lora_alpha"]))

    def scaling(self, place: str) -> float:
        """Alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        rank = self.rank(place)
        return self.alpha(place) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    @property
    def base_model(self) -> str | None:
        """The model that it says it was trained on."""
        name = self.settings.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(info.nbytes for info in self.source.tensors.values())

    def digest(self) -> str:
        """Of the settings that matter, and of every tensor."""
        tensors = self.source.tensors.values()
        digests = {info.name: tensor_digest(info.size, partial(self.source.read_raw, info)) for info in tensors}
        relevant = {k: v for k, v in self.settings.items() if k not in _ABOUT_FILES}
        return json_digest({"settings": relevant, "tensors": digests})


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a peft adapter and no model."""
    return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").is_file()


def open_stored(ref: str, ctx: Context) -> StoredAdapter:
    """Open a peft LoRA adapter: a stage, a directory or a hub id.

    Raises:
        CheckpointError: not found, not a LoRA adapter, a setting or a tensor that is not supported (named), half of a
            low-rank update, or factors whose shapes disagree with each other.
    """
    located = resolve(ref, ctx)
    directory = located.path
    settings = read_settings(directory)
    source = open_source(_weights(directory, allow_pickle=ctx.allow_pickle))
    found: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    full: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        plain = name.removeprefix(PREFIX)
        if (match := _LOW_RANK.fullmatch(plain)) is not None:
            module = match["module"]
            part = match["magnitude"] or (match["embedding"] or "") + match["side"]
            if match["leaf"] == "bias":
                if part != "B" or not settings.get("lora_bias"):
                    raise CheckpointError(_unsupported(info))
                part = "bias"
            place = (module.replace(_WRAPPER, ""), module.count(_WRAPPER))
            found.setdefault(place, {})[part] = info
        elif ".lora_" in plain:
            raise CheckpointError(_unsupported(info))
        else:
            full[plain.replace(_SAVED, ".").replace(_WRAPPER, "")] = info
    modules = tuple(_module(directory, *place, parts, settings) for place, parts in found.items())
    if not modules:
        raise CheckpointError(f"{directory}: holds no LoRA tensors")
    return StoredAdapter(ref, directory, located.revision, settings, modules, full, source)


def _unsupported(info: TensorInfo) -> str:
    return (
        f"{info.file}: tensor {info.name!r}: this kind of LoRA tensor is not supported; merge it with peft first "
        "(merge_and_unload)"
    )


def _module(
    directory: Path, name: str, depth: int, parts: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> LoraModule:
    magnitude, bias = parts.get("magnitude_vector"), parts.get("bias")
    sides = sorted(parts.keys() - {"magnitude_vector", "bias"})
    embedding = any(side.startswith("embedding") for side in sides)
    wanted = ["embedding_A", "embedding_B"] if embedding else ["A", "B"]
    if sides != wanted:
        raise CheckpointError(f"{directory}: module {name!r}: the adapter holds {sides}, expected {wanted}")
    a, b = (parts[side] for side in wanted)
    for info in (a, b):
        if len(info.shape) != 2:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} {info.shape}: only LoRA of matrices is supported; "
                "merge it with peft first (merge_and_unload)"
            )
    if a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{a.file}: tensors {a.name!r} {a.shape} and {b.name!r} {b.shape} do not fit each other: the first has "
            f"rank {a.shape[0]}, the second {b.shape[1]}"
        )
    if bool(settings.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(
            f"{directory}: module {name!r}: {CONFIG_FILE} says use_dora: {bool(settings.get('use_dora'))}, yet "
            f"lora_magnitude_vector is {'absent' if magnitude is None else 'stored'}; one of the two is wrong"
        )
    for extra in (magnitude, bias):
        if extra is not None and extra.size != b.shape[0]:
            raise CheckpointError(
                f"{extra.file}: tensor {extra.name!r} {extra.shape} does not fit {b.name!r} {b.shape}: "
                f"expected {b.shape[0]} values"
            )
    return LoraModule(name, depth, a, b, embedding, magnitude, bias)


def read_settings(directory: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        CheckpointError: it is missing or damaged, is no LoRA's, or says something that is not supported (named).
    """
    file = directory / CONFIG_FILE
    if not file.exists():
        raise CheckpointError(f"{directory}: not a peft adapter: it has no {CONFIG_FILE}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON: {e}") from e
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: expected an object, found {type(settings).__name__}")
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type {settings.get('peft_type')!r} is not supported, only LORA")
    if settings.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise CheckpointError(
            f"{file}: init_lora_weights {settings['init_lora_weights']!r} changed the base model too, so the adapter "
            "does not fit the original; convert it to a plain LoRA with peft (path_initial_model_for_weight_conversion)"
        )
    for key, value in settings.items():
        if key not in _UNDERSTOOD and value not in (None, False, {}, []):
            raise CheckpointError(f"{file}: `{key}: {value!r}` is not supported; merge it with peft first")
    for key in ("r", "lora_alpha"):
        _number(file, key, settings.get(key))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{file}: `{key}` must map patterns to numbers, found {patterns!r}")
        for pattern, value in patterns.items():
            _number(file, f"{key}.{pattern}", value)
            try:
                re.compile(pattern)
            except re.error as e:
                raise CheckpointError(f"{file}: `{key}`: {pattern!r} is no regular expression: {e}") from e
    return settings


def _number(file: Path, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{file}: `{key}` must be a number, found {value!r}")
    if not key.startswith(("lora_alpha", "alpha_pattern")) and (value < 1 or value != int(value)):
        raise CheckpointError(f"{file}: `{key}` must be a whole number above 0, found {value!r}")


def _weights(directory: Path, *, allow_pickle: bool) -> Weights:
    safe, pickled = directory / WEIGHTS_FILE, directory / "adapter_model.bin"
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


def _by_pattern(patterns: Mapping[str, Any] | None, place: str, default: Any) -> Any:
    """As peft looks them up: the first pattern that matches the end of the name from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", place):
            return value
    return default

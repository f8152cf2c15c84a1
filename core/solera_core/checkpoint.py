"""Reading a checkpoint: config and headers at once, tensors in ranges when they are asked for, never a whole model.

`open_checkpoint` checks everything that the headers can tell, so that whoever holds a `Checkpoint` can rely on it:
every listed tensor is there in full, every tensor there is listed, and no byte belongs to two of them.
"""

import copy
import json
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from solera_core.architecture import is_embedding, is_head, ties_with_a_stored_head
from solera_core.context import Context
from solera_core.digest import checkpoint_digest, json_digest, tensor_digest
from solera_core.dtypes import FLOATS, to_float32
from solera_core.errors import CheckpointError
from solera_core.headers import TensorInfo
from solera_core.hub import When, resolve, split_adapter
from solera_core.ranges import RangeReader, stamp
from solera_core.remote import RemoteSource
from solera_core.shards import find_weights
from solera_core.sidecars import find_sidecars
from solera_core.sources import SafetensorsSource, Source, open_source

__all__ = ["Checkpoint", "TensorInfo", "locate", "open_checkpoint", "read_config"]

_COMPARE: Final = 1 << 22  # elements compared at a time
_HASHED_WHOLE: Final = 1 << 26  # bytes of a model that are hashed without asking: some hundredths of a second
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class Checkpoint:
    """One model, opened by `open_checkpoint`. Reading is thread-safe.

    It lies on disk; or, opened with `weights="later"`, its weights may still be on the hub: then everything but their
    values is known, and `fetch` must come before they are read.

    Attributes:
        ref: the reference as it was written.
        path: the directory (of the base model, when an adapter is laid over it).
        revision: the hub commit, where it came from the hub.
        tensors: what is stored, in order of (file, offset). A head that only repeats tied embeddings is left out.
        sidecars: tokenizer, chat template, generation config and processor files.
        notes: what a plan should say about how it is read (of a view).
        as_stored: config, names and shapes are those of the files, so that these can be loaded in its place.
    """

    notes: tuple[str, ...] = ()
    as_stored: bool = True

    def __init__(
        self,
        *,
        ref: str,
        path: Path,
        revision: str | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        source: Source,
        sidecars: list[Path],
    ) -> None:
        self.ref = ref
        self.path = path
        self.revision = revision
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.sidecars = sidecars
        self._config = dict(config)
        self._source = source
        self._digest: str | None = None
        self._digest_lock = threading.Lock()

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, a deep copy: changing it changes nothing here."""
        return copy.deepcopy(self._config)

    @property
    def directories(self) -> tuple[Path, ...]:
        """All that it is read from: the model's directory, then those of what is laid over it."""
        return (self.path,)

    @property
    def missing_bytes(self) -> int:
        """What `fetch` would download into the file system of `path`."""
        return self._source.missing_bytes if isinstance(self._source, RemoteSource) else 0

    def fetch(self) -> None:
        """Download the weights, if they are not here; before anything reads them, and by one thread.

        Raises:
            HubError: the hub cannot be reached or refuses.
            CheckpointError: the headers are not those read before, or the config ties a head that is no copy of the
                embedding (which no header tells).
        """
        if isinstance(self._source, RemoteSource):
            local = self._source.fetch()
            _without_tied_head(self.path, self._config, local)
            self._source = local

    def __repr__(self) -> str:
        return f"Checkpoint({self.ref!r}, {len(self.tensors)} tensors)"

    def read_flat(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """Elements [start, stop) of a tensor in C order as float32, 1-D, a new array.

        Raises:
            CheckpointError: no such tensor, or its dtype is none of F32, F16, BF16, F64.
        """
        info, stop = self._range(name, start, stop)
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.ref}: tensor {name!r} is stored as {info.dtype}, which cannot be computed with "
                f"(only {', '.join(FLOATS)}); dequantise the model first"
            )
        return to_float32(self._source.read_raw(info, start, stop), info.dtype)

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """The stored bytes of elements [start, stop), 1-D, a new array.

        Raises:
            CheckpointError: no such tensor, or it is derived, so that no stored bytes are its value.
        """
        info, stop = self._range(name, start, stop)
        return self._source.read_raw(info, start, stop)

    def read_small(self, names: Sequence[str]) -> dict[str, bytes]:
        """The stored bytes of small tensors, by name; on the hub by range requests, before `fetch`.

        Raises:
            HubError: the hub cannot be reached or refuses.
        """
        if isinstance(self._source, RemoteSource):
            return self._source.peek([self.tensors[name] for name in names])
        return {name: self.read_raw(name).tobytes() for name in names}

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor as float32, shaped."""
        return self.read_flat(name).reshape(self.tensors[name].shape)

    def scratch(self, name: str) -> tuple[int, int]:
        """Memory that `read_flat` takes besides its result: (bytes an element that is read, bytes in any case)."""
        del name
        return 0, 0

    def is_derived(self, name: str) -> bool:
        """Whether the value is computed when it is read (then `read_raw` is refused); see `solera_core.views`."""
        del name
        return False

    def is_plain(self, name: str, dtypes: Collection[str]) -> bool:
        """Whether a tensor's value is just the bytes in its file, in one of `dtypes`; `reader` gives that file."""
        return isinstance(self._source, SafetensorsSource) and self.tensors[name].dtype in dtypes

    def reader(self, name: str) -> RangeReader | None:
        """The file of a tensor, open for many reads at the offsets of `tensors[name]`.

        None where no file holds its plain value: it is pickled, or derived.
        """
        return self._source.reader(self.tensors[name]) if isinstance(self._source, SafetensorsSource) else None

    def digest(self) -> str:
        """`blake3:...` over config and every tensor, whatever the shards.

        Taken from solera.json where that is there, about exactly this config and these headers, and no weight file is
        newer (never for a download); else every byte is read, once.
        """
        with self._digest_lock:
            if self._digest is None:
                self._digest = _recorded_digest(self) or checkpoint_digest(
                    self._config, self.tensors.values(), self.tensor_digests()
                )
            return self._digest

    def identity(self) -> str:
        """What the model is, without reading all of it where that takes long.

        `digest()` where solera.json tells it or the weights are at most 64 MiB. Else `sampled:...`: over config,
        headers and, of every file, the SHA-256 that the hub calls it by in its cache, or 64 samples of 4 KiB spread
        evenly over it. Independent of when and where the files were made. Two fine-tunes differ in it; a change of a
        few bytes somewhere does not show.
        """
        if sum(info.nbytes for info in self.tensors.values()) <= _HASHED_WHOLE or _recorded_digest(self) is not None:
            return self.digest()
        headers = [[t.name, t.dtype, list(t.shape)] for t in self.tensors.values()]
        files = sorted({info.file for info in self.tensors.values()})
        content = {
            "config": self._config,
            "headers": headers,
            "files": [_file_identity(file) for file in files],
        }
        return json_digest(content).replace("blake3:", "sampled:")

    def fingerprint(self) -> str:
        """A digest of the files' sizes, times and places: whether this is still the very same input."""
        files = sorted({info.file for info in self.tensors.values()})
        stamps = [[str(file), *astuple(stamp(file))] for file in files]
        return json_digest({"files": stamps, "config": self._config})

    def require_unchanged(self) -> None:
        """Raise CheckpointError when a weight file is no longer the one that was opened.

        Every read checks that at its beginning; this is the check behind the last one.
        """
        if isinstance(self._source, SafetensorsSource):
            self._source.require_unchanged()

    def tensor_digests(self) -> dict[str, str]:
        """`blake3:<hex>` of the stored bytes of each tensor, read anew (of a view: those of the model it shows)."""
        return {
            info.name: tensor_digest(info.size, partial(self._source.read_raw, info)) for info in self.tensors.values()
        }

    def _range(self, name: str, start: int, stop: int | None) -> tuple[TensorInfo, int]:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.ref}: has no tensor {name!r}")
        stop = info.size if stop is None else stop
        if not 0 <= start <= stop <= info.size:
            raise ValueError(f"tensor {name}: range [{start}, {stop}) of {info.size} elements")
        return info, stop


def open_checkpoint(ref: str | Path, ctx: Context, *, weights: When = "now", dequantise: bool = False) -> Checkpoint:
    """Open a model for reading: config and headers are read and checked, weights are not.

    Args:
        ref: a stage name in `ctx.models`, a directory (relative to `ctx.base_dir`), `org/name[@revision]` on the hub,
            or `<model>+<adapter>` with a peft LoRA directory or hub id.
        ctx: where names resolve, and whether pickles and remote code are allowed.
        weights: "later": those of a model on the hub stay there until `Checkpoint.fetch`; config, tokenizer and
            headers are enough to open it. Adapters and pickles are downloaded at once.
        dequantise: a quantised model is seen as the weights that its codes stand for; else as it is stored.

    Raises:
        CheckpointError: not found, not a checkpoint, damaged, pickled or with remote code without permission; or
            quantised in a way that cannot be undone.
        HubError: the hub cannot be reached.
    """
    try:
        return _open(ref, ctx, weights, dequantise=dequantise)
    except OSError as e:
        raise CheckpointError(f"{e.filename or ref}: cannot be read: {e.strerror}") from e


def _open(ref: str | Path, ctx: Context, weights: When, *, dequantise: bool) -> Checkpoint:
    if (parts := split_adapter(ref, ctx)) is not None:
        from solera_core.adapters import lay_over

        base = open_checkpoint(parts[0], ctx, weights=weights, dequantise=dequantise)
        return lay_over(base, parts[1], ctx, ref=str(ref))
    located = resolve(ref, ctx, weights=weights)
    config = read_config(located.path, trust_remote_code=ctx.trust_remote_code)
    if (listing := located.listing) is None:
        source = open_source(find_weights(located.path, allow_pickle=ctx.allow_pickle))
    else:
        names = [name for name in listing.sizes if "/" not in name]
        source = RemoteSource(listing, find_weights(located.path, allow_pickle=ctx.allow_pickle, names=names))
    if not source.tensors:
        raise CheckpointError(f"{located.path}: holds no tensors")
    checkpoint = Checkpoint(
        ref=str(ref),
        path=located.path,
        revision=located.revision,
        config=config,
        tensors=_without_tied_head(located.path, config, source),
        source=source,
        sidecars=find_sidecars(located.path, code=ctx.trust_remote_code),
    )
    if not dequantise:
        return checkpoint
    from solera_core.quantised.catalogue import dequantised

    return dequantised(checkpoint)


def locate(ref: str | Path, ctx: Context) -> Path:
    """The directory of a model for transformers to load; downloads it when it is on the hub.

    Raises:
        CheckpointError: as `open_checkpoint`; and a reference with an adapter, which no directory holds.
    """
    if split_adapter(ref, ctx) is not None:
        raise CheckpointError(
            f"{ref}: a model with an adapter cannot be loaded here; merge it into a directory first "
            "(solera merge, merge_method: passthrough)"
        )
    located = resolve(ref, ctx)
    read_config(located.path, trust_remote_code=ctx.trust_remote_code)
    find_weights(located.path, allow_pickle=ctx.allow_pickle)
    return located.path


def read_config(directory: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        CheckpointError: it is missing or damaged, or it asks for Python code of its own without permission.
    """
    file = directory / "config.json"
    if not file.exists():
        if (directory / "adapter_config.json").exists():
            raise CheckpointError(
                f"{directory}: is a LoRA adapter, not a model; write <model>+{directory.name}, "
                "behind the model that it was made for, or add `adapter: {}` to the recipe to merge adapters into one"
            )
        if (directory / "route.json").exists():
            raise CheckpointError(
                f"{directory}: is a route over whole models, not a model with weights; `solera eval` and a "
                "distillation's `teachers` take it"
            )
        if any(directory.glob("*.gguf")):
            raise CheckpointError(
                f"{directory}: holds GGUF weights, which are quantised in llama.cpp's own ways and layout and cannot "
                "be read; use the checkpoint that they were made from"
            )
        raise CheckpointError(f"{directory}: not a checkpoint: it has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON: {e}") from e
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected an object, found {type(config).__name__}")
    _check_types(file, config)
    if "auto_map" in config and not trust_remote_code:
        raise CheckpointError(
            f"{file}: `auto_map` asks to run Python code of this checkpoint ({config['auto_map']!r}); read that code, "
            "then pass --trust-remote-code, or delete `auto_map` where transformers knows the model type itself"
        )
    return config


def _check_types(file: Path, config: Mapping[str, Any]) -> None:
    """What is read here without transformers must be of the kind that transformers writes."""
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{file}: `architectures` must be a list of class names, found {names!r}")
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{file}: `model_type` must be a string, found {config['model_type']!r}")
    quantisation = config.get("quantization_config") or {}
    if not isinstance(quantisation, dict):
        raise CheckpointError(f"{file}: `quantization_config` must be an object, found {quantisation!r}")


def _without_tied_head(path: Path, config: Mapping[str, Any], source: Source) -> Mapping[str, TensorInfo]:
    """The tensors less an output head that repeats tied embeddings.

    Many fine-tunes store both although the config ties them. Equal bytes: the head is a copy and is left out, as
    transformers leaves it out. Unequal ones contradict the flag: which of the two is meant only a person can say
    (transformers#45127: the flag destroys a merged head). While the weights are on the hub they are taken for equal:
    unequal ones are an error in any case, only found later, by `Checkpoint.fetch`.
    """
    embeddings = [t for n, t in source.tensors.items() if is_embedding(n)]
    heads = [t for n, t in source.tensors.items() if is_head(n)]
    if not embeddings or not heads or not ties_with_a_stored_head(config):
        return source.tensors
    head, embedding = heads[0], embeddings[0]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and (
        isinstance(source, RemoteSource)
        or all(
            np.array_equal(
                source.read_raw(head, at, min(at + _COMPARE, head.size)),
                source.read_raw(embedding, at, min(at + _COMPARE, head.size)),
            )
            for at in range(0, head.size, _COMPARE)
        )
    )
    if not same:
        raise CheckpointError(
            f"{path}: config.json ties the embeddings (tie_word_embeddings, or its default for "
            f"{config.get('model_type')!r}), yet {head.name!r} {head.shape} differs from "
            f"{embedding.name!r} {embedding.shape}; set tie_word_embeddings to false if the head is meant, "
            "or delete the head from the weights"
        )
    return {name: info for name, info in source.tensors.items() if name != head.name}


def _file_identity(file: Path) -> list[Any]:
    """[size, SHA-256 as the hub states it, or a digest of samples]."""
    size = stamp(file).nbytes
    blob = file.resolve().name
    if file.is_symlink() and _SHA256.fullmatch(blob):
        return [size, f"sha256:{blob}"]
    hasher = blake3()
    with RangeReader(file) as reader:
        for i in range(_SAMPLES):
            at = i * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1)
            sample = np.empty(min(_SAMPLE_BYTES, size - at), np.uint8)
            reader.read_into(at, sample)
            hasher.update(sample.data)
    return [size, f"blake3:{hasher.hexdigest()}"]


def _recorded_digest(checkpoint: Checkpoint) -> str | None:
    """The digest in solera.json, if it is about exactly this config and these headers and nothing is newer."""
    if checkpoint.revision is not None:
        return None  # downloaded: the record is somebody else's claim
    record = checkpoint.path / "solera.json"
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        written = record.stat().st_mtime_ns
        if any(file.stat().st_mtime_ns > written for file in {t.file for t in checkpoint.tensors.values()}):
            return None  # touched since: the record may be about other weights
        expected = checkpoint_digest(checkpoint._config, checkpoint.tensors.values(), content["tensors"])
        return expected if content["digest"] == expected else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

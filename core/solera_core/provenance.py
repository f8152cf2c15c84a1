"""solera.json: what a directory was made from, and digests that prove it has not changed since.

Nothing in it depends on when or where it was made: the same recipe, inputs and seed give the same bytes.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from solera_core.checkpoint import Checkpoint, read_config
from solera_core.data import DataSource, read_documents
from solera_core.digest import checkpoint_digest, file_sha256, json_digest, tensor_digest
from solera_core.errors import CheckpointError, DataError, VerificationError
from solera_core.headers import TensorInfo
from solera_core.lora import WEIGHTS_FILE, StoredAdapter, is_adapter, read_settings
from solera_core.shards import Weights, find_weights, read_headers
from solera_core.sources import SafetensorsSource
from solera_core.staging import RESUME_KEY_FILE
from solera_core.version import __version__

__all__ = [
    "BASE_DIR_FILE",
    "FILE_NAME",
    "InputRecord",
    "adapter_record",
    "data_record",
    "input_record",
    "read_provenance",
    "tokenizer_record",
    "verify",
    "write_provenance",
]

FILE_NAME: Final = "solera.json"
BASE_DIR_FILE: Final = "base-dir"
"""A hint at a place, which changes when a directory moves: never part of what was made."""
_PACKAGES: Final = (
    "accelerate",
    "huggingface_hub",
    "mergekit",
    "numpy",
    "peft",
    "pydantic",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class InputRecord:
    """One input of a stage.

    Attributes:
        name: its role (`base`, `teacher`, a domain, ...).
        ref: the reference as the user wrote it.
        revision: the hub commit, where there is one.
        digest: of its content, with the algorithm in front (`sampled:`: see `Checkpoint.identity`).
    """

    name: str
    ref: str
    revision: str | None
    digest: str


def input_record(checkpoint: Checkpoint, name: str | None = None, *, attest: bool = True) -> InputRecord:
    """The record of a model; `name` is its role (default: its reference). `attest`: every byte of it is hashed."""
    digest = checkpoint.digest() if attest else checkpoint.identity()
    return InputRecord(name or checkpoint.ref, checkpoint.ref, checkpoint.revision, digest)


def tokenizer_record(checkpoint: Checkpoint) -> InputRecord:
    """The record of what gave its tokenizer and nothing else: SHA-256 of the files."""
    hasher = hashlib.sha256()
    for file in sorted(checkpoint.sidecars):
        hasher.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return InputRecord("tokenizer_source", checkpoint.ref, checkpoint.revision, "sha256:" + hasher.hexdigest())


def adapter_record(adapter: StoredAdapter) -> InputRecord:
    """The record of an adapter that is merged as such, without a model."""
    return InputRecord(adapter.ref, adapter.ref, adapter.revision, adapter.digest())


def data_record(name: str, source: DataSource, base_dir: Path) -> InputRecord:
    """The record of a data source: SHA-256 of its file, of a directory's files, or of a hub dataset's documents."""
    if source.path.startswith("hub:"):
        hasher = hashlib.sha256()
        for document in read_documents(source, base_dir=base_dir):
            hasher.update(document.id.encode())
        return InputRecord(name, source.path, None, "sha256:" + hasher.hexdigest())
    path = base_dir / Path(source.path).expanduser()
    if path.is_dir():
        hasher = hashlib.sha256()
        for file in sorted(p for p in path.iterdir() if p.is_file()):
            hasher.update(f"{file.name}\0{file_sha256(file)}\n".encode())
        return InputRecord(name, source.path, None, "sha256:" + hasher.hexdigest())
    if not path.is_file():
        raise DataError(f"{path}: no such file (data paths are relative to the recipe)")
    return InputRecord(name, source.path, None, "sha256:" + file_sha256(path))


def write_provenance(
    directory: Path,
    *,
    kind: str,
    recipe: Mapping[str, Any],
    seed: int,
    inputs: Sequence[InputRecord],
    tensors: Mapping[str, str] | None,
    checks: Mapping[str, Any],
    compat: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write solera.json as the last file of `directory`, and return its content.

    Args:
        directory: a staging directory; with or without a model in it.
        kind: of the stage (`merge`, `moe`, `distill`, ...).
        recipe: the resolved settings, as JSON.
        seed: of the stage.
        inputs: models and data that went in.
        tensors: digest of every tensor as `CheckpointWriter.finish` gives them; None: the weights are read again.
        checks: what `check_output` returned.
        compat: the tool whose bytes were reproduced, and the versions that decide about them; None: no such tool.

    Raises:
        VerificationError: `tensors` and the weights in the directory are not about the same names.
        CheckpointError: the weights in the directory are damaged.
    """
    stored = _stored(directory)
    digests = _digests(stored) if tensors is None else dict(tensors)
    if digests.keys() != stored.keys():
        odd = sorted(digests.keys() ^ stored.keys())
        raise VerificationError(
            f"{directory}: {len(odd)} tensors are written or hashed, not both: {', '.join(odd[:5])}"
        )
    files = _files(directory, stored)
    content: dict[str, Any] = {
        "schema": 1,
        "solera": __version__,
        "kind": kind,
        "recipe": dict(recipe),
        "seed": seed,
        **({} if compat is None else {"compat": dict(compat)}),
        "inputs": [asdict(record) for record in inputs],
        "versions": _versions(),
        "tensors": {name: digests[name] for name in sorted(digests)},
        "files": files,
        "checks": dict(checks),
        "digest": _digest(directory, stored, digests, files),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (directory / FILE_NAME).write_text(text, encoding="utf-8")
    return content


def read_provenance(directory: Path) -> dict[str, Any]:
    """The content of solera.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = directory / FILE_NAME
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not file.exists():
        raise CheckpointError(f"{directory}: has no {FILE_NAME}; it was not made by solera")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON: {e}") from e
    shapes = {"schema": int, "kind": str, "recipe": dict, "inputs": list, "tensors": dict, "files": dict, "digest": str}
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise CheckpointError(f"{file}: not a provenance record of schema 1; it was made by another version of solera")
    for key, expected in shapes.items():
        if not isinstance(content.get(key), expected):
            raise CheckpointError(f"{file}: `{key}` is missing or not of type {expected.__name__}")
    return content


def verify(directory: Path) -> list[str]:
    """Hash everything in `directory` again; one line a problem, none when it is as solera.json says.

    Raises:
        CheckpointError: there is no (readable) solera.json.
    """
    record = read_provenance(directory)
    problems: list[str] = []
    try:
        stored = _stored(directory)
        digests = _digests(stored)
        files = _files(directory, stored)
    except CheckpointError as e:
        problems.append(str(e))
        stored, digests = {}, {}
        weights = {p.name for p in directory.glob("*.safetensors")}
        files = {n: h for n, h in _files(directory, {}).items() if n not in weights}
    else:
        recorded = record["tensors"]
        problems += [f"tensor {n}: missing" for n in sorted(recorded.keys() - digests.keys())]
        problems += [f"tensor {n}: not in {FILE_NAME}" for n in sorted(digests.keys() - recorded.keys())]
        problems += [
            f"tensor {n}: changed" for n in sorted(recorded.keys() & digests.keys()) if recorded[n] != digests[n]
        ]
    recorded = record["files"]
    problems += [f"{n}: missing" for n in sorted(recorded.keys() - files.keys())]
    problems += [f"{n}: not in {FILE_NAME}" for n in sorted(files.keys() - recorded.keys())]
    problems += [f"{n}: changed" for n in sorted(recorded.keys() & files.keys()) if recorded[n] != files[n]]
    if not problems and record["digest"] != _digest(directory, stored, digests, files):
        problems.append(f"{FILE_NAME}: its digest disagrees with what it lists (a shape, a dtype or the record itself)")
    return problems


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _stored(directory: Path) -> dict[str, TensorInfo]:
    """The tensors of the model or adapter in `directory`; none where there is neither."""
    if is_adapter(directory):
        return read_headers(Weights((directory / WEIGHTS_FILE,), None, None, pickled=False))
    if not (directory / "config.json").exists() and not any(directory.glob("model*.safetensors*")):
        return {}
    return read_headers(find_weights(directory, allow_pickle=False))


def _digests(stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    source = SafetensorsSource(stored)
    return {name: tensor_digest(info.size, partial(source.read_raw, info)) for name, info in stored.items()}


def _files(directory: Path, stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """SHA-256 of every file but the weights, the record itself and what a hub and its client put beside them."""
    weights = {info.file for info in stored.values()} | {
        directory / FILE_NAME,
        directory / RESUME_KEY_FILE,
        directory / BASE_DIR_FILE,
    }
    return {
        file.relative_to(directory).as_posix(): file_sha256(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file not in weights and not _of_the_hub(file.relative_to(directory))
    }


def _of_the_hub(path: Path) -> bool:
    """`.gitattributes` is made by the hub, `.cache/huggingface` by its client in a downloaded directory."""
    return path.as_posix() == ".gitattributes" or path.parts[:2] == (".cache", "huggingface")


def _digest(
    directory: Path, stored: Mapping[str, TensorInfo], digests: Mapping[str, str], files: Mapping[str, str]
) -> str:
    if not stored:
        return json_digest({"files": files})
    if is_adapter(directory):
        return checkpoint_digest(read_settings(directory), stored.values(), digests)
    config = read_config(directory, trust_remote_code=True) if (directory / "config.json").exists() else {}
    return checkpoint_digest(config, stored.values(), digests)

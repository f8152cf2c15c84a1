"""From a model reference to a directory on this machine: a finished stage, a local directory, or the hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from solera_core.context import Context
from solera_core.errors import CheckpointError, HubError

__all__ = ["Located", "resolve", "split_adapter"]

_HUB_ID: Final = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[\w./-]+))?")
_PATTERNS: Final = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.model.v3",
    "*.tiktoken",
    "*.txt",
    "*.codes",
    "*.spm",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_IGNORED: Final = ("consolidated*", "original/*", "onnx/*", "openvino/*", "runs/*", "checkpoint-*/*")


@dataclass(frozen=True)
class Located:
    """Where a reference leads: a directory, and the commit it was resolved to when it came from the hub."""

    path: Path
    revision: str | None


def resolve(ref: str | Path, ctx: Context) -> Located:
    """The directory of a model reference.

    In this order: a stage name in `ctx.models`; a local directory, relative to `ctx.base_dir`; `org/name[@revision]`
    on the hub (HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured by huggingface_hub).

    Raises:
        CheckpointError: nothing of all that exists; the message says what was tried.
        HubError: the hub cannot be reached or refuses.
    """
    text = str(ref)
    if not text:
        raise CheckpointError("a model reference is empty; give a directory, a stage or a hub id such as org/name")
    if (local := _local(text, ctx)) is not None:
        return Located(local, _snapshot_revision(local))
    path = ctx.base_dir / Path(text).expanduser()
    if path.exists():
        raise CheckpointError(f"{path}: is a file; a model is a directory (or a hub id such as org/name)")
    tried = f"no finished stage of that name{_names(ctx)}, no directory {path}"
    match = _HUB_ID.fullmatch(text)
    if match is None:
        raise CheckpointError(f"model {text!r} not found: {tried}, and not a hub id (org/name or org/name@revision)")
    return _download(match["id"], match["revision"], tried, ctx)


def split_adapter(ref: str | Path, ctx: Context) -> tuple[str, str] | None:
    """`("<model>", "<adapter>")` when the reference is `<model>+<adapter>`, else None.

    A directory or stage whose own name holds a plus sign wins; else the last plus sign splits that leaves an existing
    directory or a hub id on its right.
    """
    text = str(ref)
    if "+" not in text or _local(text, ctx) is not None:
        return None
    cuts = [i for i in range(len(text) - 2, 0, -1) if text[i] == "+"]
    for cut in cuts:
        if _local(text[cut + 1 :], ctx) is not None:
            return text[:cut], text[cut + 1 :]
    return (text[: cuts[0]], text[cuts[0] + 1 :]) if cuts else None


def _local(text: str, ctx: Context) -> Path | None:
    if text in ctx.models:
        return ctx.models[text]
    path = ctx.base_dir / Path(text).expanduser()
    try:
        return path if text and path.is_dir() else None
    except OSError as e:  # a mount that is gone, or a folder that may not be entered
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e


def _names(ctx: Context) -> str:
    return f" (there are: {', '.join(ctx.models)})" if ctx.models else ""


def _snapshot_revision(path: Path) -> str | None:
    """The commit, where a directory is a snapshot inside the hub's cache."""
    resolved = path.resolve()
    inside = resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--")
    return resolved.name if inside else None


def _download(repo: str, revision: str | None, tried: str, ctx: Context) -> Located:
    import huggingface_hub
    from huggingface_hub import constants, errors

    shown = f"{repo}@{revision}" if revision else repo
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    patterns = [*_PATTERNS, *(["*.py"] if ctx.trust_remote_code else [])]

    def fetch(allowed: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=allowed, ignore_patterns=list(_IGNORED), endpoint=endpoint
            )
        )

    try:
        path = fetch(patterns)
        if ctx.allow_pickle and not any(path.glob("*.safetensors")):
            path = fetch([*patterns, "*.bin"])
    except errors.RevisionNotFoundError as e:
        raise CheckpointError(
            f"model {shown!r}: {endpoint} has {repo}, but no branch, tag or commit {revision!r}"
        ) from e
    except errors.GatedRepoError as e:
        raise HubError(f"model {shown!r}: access is gated; ask for it at {endpoint}/{repo} and set HF_TOKEN") from e
    except errors.RepositoryNotFoundError as e:
        raise CheckpointError(
            f"model {shown!r} not found: {tried}, and {endpoint} has no such model (for a private one set HF_TOKEN)"
        ) from e
    except errors.LocalEntryNotFoundError as e:
        if constants.is_offline_mode():
            raise CheckpointError(
                f"model {shown!r} not found: {tried}, and HF_HUB_OFFLINE is set while the cache "
                f"({constants.HF_HUB_CACHE}) has no copy; unset it or download the model beforehand"
            ) from e
        raise HubError(
            f"model {shown!r}: {tried}, and {endpoint} cannot be reached while the cache has no copy: {_reason(e)}"
        ) from e
    except errors.HFValidationError as e:
        raise CheckpointError(f"model {shown!r} not found: {tried}, and it is no valid hub id: {e}") from e
    except OSError as e:  # HTTP errors and broken connections derive from it
        raise HubError(f"model {shown!r}: download from {endpoint} failed: {_reason(e)}; run again to resume") from e
    return Located(path, path.name)


def _reason(e: BaseException) -> str:
    root = e
    while root.__cause__ is not None:
        root = root.__cause__
    return f"{type(root).__name__}: {root}".splitlines()[0]

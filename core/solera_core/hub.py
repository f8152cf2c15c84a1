"""From a model reference to a directory on this machine: a finished stage, a local directory, or the hub.

A model on the hub is downloaded as a whole, or (`weights="later"`) its small files only, into the same place of the
same cache: a commit, whose weights `download` brings behind them.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final, Literal

from solera_core.context import Context
from solera_core.errors import CheckpointError, HubError
from solera_core.shards import find_weights
from solera_core.sidecars import PATTERNS as SIDECARS

__all__ = [
    "Listing",
    "Located",
    "When",
    "download",
    "explained",
    "is_hub_id",
    "missing_bytes",
    "resolve",
    "split_adapter",
]

When = Literal["now", "later"]
"""Whether the weights of a model on the hub are needed at once."""

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
_SMALL: Final = (
    "config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "solera.json",
    "README.md",
    *SIDECARS,
)
_IGNORED: Final = ("consolidated*", "original/*", "onnx/*", "openvino/*", "runs/*", "checkpoint-*/*")


@dataclass(frozen=True)
class Listing:
    """A commit on the hub whose small files are here and whose weights are not.

    Attributes:
        repo: `org/name`.
        commit: in full.
        endpoint: the hub.
        path: the commit's place in the cache.
        sizes: bytes of every file in the repository, by its path there.
        code: Python files are wanted too.
    """

    repo: str
    commit: str
    endpoint: str
    path: Path
    sizes: Mapping[str, int]
    code: bool


@dataclass(frozen=True)
class Located:
    """Where a reference leads.

    Attributes:
        path: a directory.
        revision: the commit it was resolved to, when it came from the hub.
        listing: what the hub has, where the weights are still to be downloaded.
    """

    path: Path
    revision: str | None
    listing: Listing | None = None


def resolve(ref: str | Path, ctx: Context, *, weights: When = "now") -> Located:
    """The directory of a model reference.

    In this order: a stage name in `ctx.models`; a local directory, relative to `ctx.base_dir`; `org/name[@revision]`
    on the hub (HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured by huggingface_hub).

    Args:
        ref: as written.
        ctx: where names resolve, and what may be downloaded.
        weights: "later": of a model on the hub only the small files are downloaded, if its weights are not here yet.
            (Pickled ones are, where they are allowed: they have no header to read beforehand.)

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
    return (_download if weights == "now" else _look)(match["id"], match["revision"], tried, ctx)


def is_hub_id(ref: str) -> bool:
    """Whether a reference could name a model on the hub: `org/name` or `org/name@revision`."""
    return _HUB_ID.fullmatch(ref) is not None


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


def missing_bytes(listing: Listing) -> int:
    """What `download` would add to the cache."""
    return sum(
        size
        for name, size in listing.sizes.items()
        if any(fnmatch(name, pattern) for pattern in _patterns(code=listing.code))
        and not any(fnmatch(name, pattern) for pattern in _IGNORED)
        and not (listing.path / name).exists()
    )


def download(listing: Listing) -> None:
    """Bring the files of exactly this commit into the cache; what is there already is left as it is.

    Raises:
        HubError: the hub cannot be reached or refuses.
        CheckpointError: it has no such commit any more.
    """
    with explained(listing.repo, listing.commit, "not in the cache", listing.endpoint):
        _snapshot(listing.repo, listing.commit, _patterns(code=listing.code), listing.endpoint)


@contextmanager
def explained(repo: str, revision: str | None, tried: str, endpoint: str) -> Iterator[None]:
    """Whatever the hub's client raises inside becomes an error that says what is wrong and what to do.

    Args:
        repo: `org/name`.
        revision: as asked for.
        tried: where else the model was looked for.
        endpoint: the hub.

    Raises:
        CheckpointError: no such repository or revision, or (offline) not in the cache.
        HubError: access is gated, or the hub cannot be reached, or the transfer broke.
    """
    from huggingface_hub import constants, errors

    shown = f"{repo}@{revision}" if revision else repo
    # httpx's HTTPError, from whichever httpx the client is built on: broken connections are no OSError there.
    transport: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
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
    except (OSError, transport) as e:
        raise HubError(f"model {shown!r}: download from {endpoint} failed: {_reason(e)}; run again to resume") from e


def _download(repo: str, revision: str | None, tried: str, ctx: Context) -> Located:
    from huggingface_hub import errors

    endpoint = _endpoint()
    patterns = _patterns(code=ctx.trust_remote_code)
    with explained(repo, revision, tried, endpoint):
        try:
            path = _snapshot(repo, revision, patterns, endpoint)
        except errors.LocalEntryNotFoundError:  # no network; a cache that lacks a README, say, will do
            path = _snapshot(repo, revision, _small(ctx), endpoint)
            if not _has_weights(path):
                raise
        if ctx.allow_pickle and not any(path.glob("*.safetensors")):
            path = _snapshot(repo, revision, [*patterns, "*.bin"], endpoint)
    return Located(path, path.name)


def _look(repo: str, revision: str | None, tried: str, ctx: Context) -> Located:
    """The small files of a model, and what else there is to be downloaded."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    endpoint = _endpoint()
    with explained(repo, revision, tried, endpoint):
        path = _snapshot(repo, revision, _small(ctx), endpoint)  # finds out the commit, too
        if _has_weights(path):
            return Located(path, path.name)
        if constants.is_offline_mode():
            return _download(repo, revision, tried, ctx)  # says what is missing
        tree = HfApi(endpoint=endpoint).list_repo_tree(repo, recursive=True, revision=path.name)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    if ctx.allow_pickle and not any("/" not in name and name.endswith(".safetensors") for name in sizes):
        return _download(repo, path.name, tried, ctx)
    return Located(path, path.name, Listing(repo, path.name, endpoint, path, sizes, ctx.trust_remote_code))


def _has_weights(path: Path) -> bool:
    """Whether all weights of a snapshot are in the cache; its files appear there only when they are whole."""
    try:
        find_weights(path, allow_pickle=False)
    except CheckpointError:
        return False
    return True


def _snapshot(repo: str, revision: str | None, allowed: Sequence[str], endpoint: str) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(allowed), ignore_patterns=list(_IGNORED), endpoint=endpoint
        )
    )


def _patterns(*, code: bool) -> list[str]:
    return [*_PATTERNS, *(["*.py"] if code else [])]


def _small(ctx: Context) -> list[str]:
    return [*_SMALL, *(["*.py"] if ctx.trust_remote_code else [])]


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT)


def _reason(e: BaseException) -> str:
    root = e
    while root.__cause__ is not None:
        root = root.__cause__
    return f"{type(root).__name__}: {root}".splitlines()[0]

"""Where a checkpoint came from: its solera.json, that of what it was made from, and so on to the given models.

Nothing is downloaded: a parent is found among the stages of the run, beside the checkpoint, relative to the recipe, or
in the hub's cache; where it is not on this machine, its reference is all that is known.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from solera.recipe_dir import read_recipe_dir
from solera_core.context import Context

__all__ = ["Ancestor", "hub_parents", "sources", "trace"]

_HUB_ID: Final = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[\w./-]+))?\Z")
_CACHED: Final = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)\Z")
_DEPTH: Final = 64  # of a chain of stages; a circle of records ends here


@dataclass(frozen=True)
class Ancestor:
    """One model in the lineage.

    Attributes:
        name: how to call it: the reference as written, absolute paths cut to their last part.
        kind: of the stage that made it; `given` when no stage of solera did.
        role: what it was to the model it went into (`teacher`, `start`, or empty).
        hub_id: `org/name` when it is a model on the hub.
        revision: its commit, where known.
        digest: of its content.
        directory: where it is on this machine, if it is.
        parents: the models that went in.
        data: names of the texts that went in.
    """

    name: str
    kind: str
    role: str = ""
    hub_id: str | None = None
    revision: str | None = None
    digest: str = ""
    directory: Path | None = None
    parents: tuple["Ancestor", ...] = ()
    data: tuple[str, ...] = ()

    @property
    def from_outside(self) -> bool:
        """Whether its licence and its name are somebody else's to say: no stage made it, or it stands on the hub."""
        return self.hub_id is not None or self.kind == "given"


def trace(directory: Path, name: str, ctx: Context) -> Ancestor:
    """The lineage of the checkpoint in `directory`, which is called `name`."""
    return _trace(directory, name, "", ctx, _DEPTH)


def sources(ancestor: Ancestor) -> list[Ancestor]:
    """The models from outside that it rests on, nearest first, each once; its own line ends at each of them."""
    found: dict[str, Ancestor] = {}
    for one in _walk_to_outside(ancestor):
        found.setdefault(one.hub_id or one.name, one)
    return list(found.values())


def hub_parents(ancestor: Ancestor) -> list[str]:
    """The hub ids for a card's `base_model`, over unpublished stages: what its weights come from, not its teachers."""
    return list(dict.fromkeys(one.hub_id for one in _walk_to_outside(ancestor, teachers=False) if one.hub_id))


def _walk_to_outside(ancestor: Ancestor, *, teachers: bool = True) -> Iterator[Ancestor]:
    for parent in ancestor.parents:
        if not teachers and parent.role == "teacher":
            continue
        if parent.from_outside:
            yield parent
        else:
            yield from _walk_to_outside(parent, teachers=teachers)


def _trace(directory: Path, name: str, role: str, ctx: Context, depth: int) -> Ancestor:
    record = _record(directory)
    hub_id, revision = _snapshot(directory)
    if record is None:
        return Ancestor(name, "given", role, hub_id, revision, directory=directory)
    kind, recipe = str(record.get("kind", "given")), record.get("recipe")
    parents: list[Ancestor] = []
    data: list[str] = []
    for item in record.get("inputs", []) if depth > 0 else []:
        ref, digest = str(item.get("ref", "")), str(item.get("digest", ""))
        if item.get("name") == "tokenizer_source":
            continue  # neither weights nor texts came from it
        if not digest.startswith(("blake3:", "sampled:")):  # of files of text: sha256
            data.append(ref if ref.startswith("hub:") else PurePosixPath(ref).name)
            continue
        part = _role(kind, recipe if isinstance(recipe, Mapping) else {}, ref)
        parents += _parents(ref, item.get("revision"), digest, part, directory, ctx, depth)
    return Ancestor(
        name,
        kind,
        role,
        hub_id,
        revision,
        str(record.get("digest", "")),
        directory,
        _distinct(parents),
        tuple(dict.fromkeys(data)),
    )


def _parents(ref: str, revision: Any, digest: str, role: str, child: Path, ctx: Context, depth: int) -> list[Ancestor]:
    """The model of a reference; two for `model+adapter`."""
    found = _find(ref, digest, child, ctx)
    if found is not None:
        return [_trace(found, _called(ref), role, ctx, depth - 1)]
    if "+" in ref:
        model, _, adapter = ref.rpartition("+")
        return [a for part in (model, adapter) for a in _parents(part, "main", "", role, child, ctx, depth)]
    match = _HUB_ID.match(ref)
    # `models/base` could be a folder that is gone; what came from the hub was recorded with a revision.
    if match is None or revision is None:
        return [Ancestor(_called(ref), "given", role, None, None, digest)]
    commit = str(revision) if revision != "main" else match["revision"]
    return [Ancestor(match["id"], "given", role, match["id"], commit, digest, _cached(match["id"], commit))]


def _find(ref: str, digest: str, child: Path, ctx: Context) -> Path | None:
    """A directory here: a stage of the run, one beside the child with the recorded digest, a path as written."""
    if ref in ctx.models:
        return ctx.models[ref]
    beside = child.absolute().parent / ref
    if ref and "/" not in ref and beside.is_dir() and digest and (_record(beside) or {}).get("digest") == digest:
        return beside
    recipe_dir = read_recipe_dir(child)
    for base in [ctx.base_dir, *([recipe_dir] if recipe_dir is not None else [])]:
        path = base / Path(ref).expanduser()
        if ref and ((path / "config.json").is_file() or (path / "adapter_config.json").is_file()):
            return path
    return None


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot in the hub's cache, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json", "README.md"):
        file = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(file, str):
            return Path(file).parent
    return None


def _snapshot(directory: Path) -> tuple[str | None, str | None]:
    """(`org/name`, commit) when the directory is a snapshot in the hub's cache."""
    resolved = directory.resolve()
    match = _CACHED.match(resolved.parent.parent.name)
    if resolved.parent.name != "snapshots" or match is None:
        return None, None
    return f"{match['owner']}/{match['name']}", resolved.name


def _record(directory: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((directory / "solera.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _role(kind: str, recipe: Mapping[str, Any], ref: str) -> str:
    """`start` or `teacher` for the inputs of a distillation; the same model as both is the start."""
    if kind != "distill":
        return ""
    student = recipe.get("student")
    start = (student.get("from") or student.get("from_")) if isinstance(student, Mapping) else None
    return "start" if ref == start else "teacher"


def _distinct(parents: list[Ancestor]) -> tuple[Ancestor, ...]:
    """Each parent once; as the start where it is both start and teacher."""
    kept: dict[str, Ancestor] = {}
    for parent in sorted(parents, key=lambda p: p.role == "teacher"):
        kept.setdefault(parent.hub_id or parent.name, parent)
    return tuple(p for p in dict.fromkeys(parents) if kept[p.hub_id or p.name] is p)


def _called(ref: str) -> str:
    path = PurePosixPath(ref)
    return path.name if path.is_absolute() or ref.startswith(("~", "..")) else ref

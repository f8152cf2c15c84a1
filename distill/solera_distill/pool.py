"""Teachers out of a route: every text is taught by the specialist that the route sends it to."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import Document
from solera_core.digest import file_sha256
from solera_core.errors import CheckpointError, ConfigError
from solera_core.provenance import FILE_NAME, InputRecord, input_record
from solera_core.route import Loader, Route, find_route, open_route, request_of
from solera_distill.config import TeacherConfig

__all__ = ["find_pool", "pool_records", "route_by_pool"]


def find_pool(teachers: Sequence[TeacherConfig], ctx: Context) -> Route | None:
    """The route that the teachers are; None where they are models.

    Raises:
        ConfigError: a route beside other teachers, or with a domain: it decides itself who teaches what.
        CheckpointError: the route is damaged, or a specialist of it is gone.
    """
    found = [(t, path) for t in teachers if (path := find_route(t.model, ctx)) is not None]
    if not found:
        return None
    teacher, path = found[0]
    if len(teachers) > 1 or teacher.domain is not None:
        raise ConfigError(
            f"teachers: {teacher.model} is a route, which decides for every text who teaches it; give it alone and "
            "without `domain`"
        )
    return open_route(path, ctx)


def route_by_pool(pool: Route, documents: Sequence[Document], ctx: Context) -> Callable[[Document], int]:
    """The index of the specialist that teaches each of these documents.

    Raises:
        CheckpointError: a model of the route has changed since it was fitted, or cannot be loaded.
    """
    pool.require_unchanged()
    unique = list({document.id: document for document in documents}.values())
    names = pool.assign([request_of(document) for document in unique], Loader(ctx, keep=1))
    indices = {document.id: pool.names.index(name) for document, name in zip(unique, names, strict=True)}
    taught = {name: names.count(name) for name in pool.names}
    ctx.progress.note("documents by teacher: " + ", ".join(f"{name} {n}" for name, n in taught.items()))
    return lambda document: indices[document.id]


def pool_records(pool: Route, ref: str, ctx: Context) -> list[InputRecord]:
    """The route itself, its base, and its specialists, by references that resolve where `ref` does."""
    record = InputRecord("route", ref, None, "sha256:" + file_sha256(pool.directory / FILE_NAME))
    models = {f"teacher {name}": model for name, model in pool.specialists.items()}
    models |= {} if pool.base is None else {"route's base": pool.base}
    found = [input_record(model, name) for name, model in models.items()]
    return [
        record,
        *(
            InputRecord(r.name, _from_here(model, ctx), r.revision, r.digest)
            for r, model in zip(found, models.values(), strict=True)
        ),
    ]


def _from_here(model: Checkpoint, ctx: Context) -> str:
    """A route's references start from a folder of its own."""
    try:
        if open_checkpoint(model.ref, ctx).path.resolve() == model.path.resolve():
            return model.ref
    except CheckpointError:
        pass
    parts = [os.path.relpath(directory, ctx.base_dir) for directory in model.directories]
    return "+".join(part if part.startswith("..") else f".{os.sep}{part}" for part in map(str, map(Path, parts)))

"""What `solera diff` does before it shows anything: which models, opened, fetched, compared."""

from collections.abc import Sequence

from solera_core.checkpoint import Checkpoint
from solera_core.context import Context
from solera_core.diff import Diff, diff
from solera_core.errors import CheckpointError, ConfigError, InputError
from solera_core.raw import open_values

__all__ = ["compare", "open_all", "refs_of"]


def refs_of(models: Sequence[str], base: str | None) -> list[str]:
    """The base, then the models: A and B are a base and a model.

    Raises:
        ConfigError: not two models without a base, or the same twice.
    """
    if base is None and len(models) != 2:
        raise ConfigError(
            f"diff: {len(models)} models and no base; give two (`solera diff A B`), or the common ancestor of several "
            "(`solera diff --base BASE A B C`)"
        )
    refs = [*([base] if base is not None else []), *models]
    if twice := [ref for i, ref in enumerate(refs) if i > 1 and ref in refs[1:i]]:
        raise ConfigError(f"diff: {twice[0]!r} is given twice")
    return refs


def open_all(refs: Sequence[str], ctx: Context) -> list[Checkpoint]:
    """Open models for reading, their weights left on the hub.

    Raises:
        InputError: one line for every model that cannot be opened.
    """
    opened: list[Checkpoint] = []
    problems: list[InputError] = []
    for ref in refs:
        try:
            opened.append(open_values(ref, ctx, weights="later"))
        except InputError as e:
            problems.append(e)
    if problems:
        raise type(problems[0])("\n".join(dict.fromkeys(map(str, problems)))) from problems[0].__cause__
    return opened


def compare(refs: Sequence[str], ctx: Context, *, ranks: bool) -> Diff:
    """The first against all others.

    Raises:
        CheckpointError: a model that cannot be read, or that has no tensor in common with the base.
        HubError: the hub cannot be reached.
    """
    base, *models = open_all(refs, ctx)
    for model in models:
        if not base.tensors.keys() & model.tensors.keys():
            raise CheckpointError(
                f"{base.ref} and {model.ref}: have no tensor in common ({next(iter(base.tensors))!r} and so on, "
                f"{next(iter(model.tensors))!r} and so on): they are of different architectures"
            )
    for checkpoint in (base, *models):
        if checkpoint.missing_bytes:
            ctx.progress.note(f"{checkpoint.ref}: downloading {checkpoint.missing_bytes / 1e9:.3f} GB")
        checkpoint.fetch()
    return diff(base, models, ranks=ranks, threads=ctx.threads, progress=ctx.progress)

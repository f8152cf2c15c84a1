"""What can be known of a recipe before its first stage runs: that every model, text and suite it names is there.

A recipe may train for hours before it reaches the stage with the misspelt name; so all of them are looked up first, and
all that is wrong is said at once.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from solera.recipe import Recipe
from solera.stages import Stage
from solera_core.checkpoint import read_config
from solera_core.context import Context
from solera_core.data import check_source, data_path
from solera_core.errors import ConfigError, InputError, TargetError
from solera_core.hub import is_hub_id, split_adapter
from solera_core.route import find_route
from solera_core.staging import check_apart
from solera_core.strict import did_you_mean
from solera_eval.config import EvalConfig
from solera_eval.suite import load_suites

__all__ = ["check_inputs", "check_run_directory"]


def check_inputs(recipe: Recipe, out: Path, ctx: Context) -> None:
    """Look up everything that the stages read and that no stage makes. Reads suites, no weights; asks no hub.

    Raises:
        TargetError: the run directory cannot be made, or is the directory of a model that is read.
        ConfigError: one line for every model, text or suite that is not there or not what it should be.
    """
    check_run_directory(out)
    # Where the stages will write: a name is enough to tell a reference to a stage from all others.
    here = replace(ctx, base_dir=recipe.base_dir, models={s.name: out / "stages" / s.name for s in recipe.stages})
    problems: list[str] = []
    given: list[Path] = []
    for stage in recipe.stages:
        for reference in stage.references.models:
            for part in _parts(reference, here):
                problems += _at(stage, _model_problems(part, here))
                given += [here.base_dir / part] if part not in here.models else []
        for reference in stage.references.tokenizers:
            problems += _at(stage, _model_problems(reference, here, whole=False))
        problems += _at(stage, _text_problems(stage, here))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    check_apart(out / "recipe.yml", [path for path in given if path.is_dir()])


def check_run_directory(out: Path) -> None:
    """Refuse a run directory that cannot be made. Raises TargetError."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        raise TargetError(f"{there}: exists and is not a directory; choose another --out")


def _at(stage: Stage, problems: Iterator[str]) -> Iterator[str]:
    for problem in problems:
        yield f"stage {stage.name!r} ({stage.kind}): {problem}"


def _parts(reference: str, ctx: Context) -> Iterator[str]:
    """`model+lora` names two things."""
    split = split_adapter(reference, ctx)
    if split is None:
        yield reference
    else:
        yield from _parts(split[0], ctx)
        yield split[1]


def _model_problems(reference: str, ctx: Context, *, whole: bool = True) -> Iterator[str]:
    """`whole`: not only its tokenizer is wanted."""
    if reference in ctx.models:
        return
    path = ctx.base_dir / Path(reference).expanduser()
    if path.is_dir():
        if whole and not (path / "adapter_config.json").exists() and find_route(path, ctx) is None:
            try:
                read_config(path, trust_remote_code=ctx.trust_remote_code)
            except InputError as e:
                yield str(e)
    elif path.exists():
        yield f"model {reference!r}: {path} is a file; a model is a directory, a stage or a hub id (org/name)"
    elif path.parent != ctx.base_dir and path.parent.is_dir():  # `models/cod` beside `models/code`: no hub is meant
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()])
        yield f"model {reference!r}: no directory {path}{near}"
    elif not is_hub_id(reference):
        yield (
            f"model {reference!r}: is no stage of this recipe, no directory {path}, and no hub id (org/name)"
            f"{did_you_mean(reference, ctx.models)}"
        )


def _text_problems(stage: Stage, ctx: Context) -> Iterator[str]:
    for source in stage.references.data:
        if data_path(source, ctx.base_dir) is not None:
            try:
                check_source(source, base_dir=ctx.base_dir)
            except InputError as e:
                yield str(e)
    if isinstance(stage.config, EvalConfig):
        for suite in stage.config.suites:
            try:
                load_suites([suite], base_dir=ctx.base_dir)
            except InputError as e:
                yield str(e)

"""`solera plan`: of a recipe what it would do, of models what could be done with them. Nothing is written."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solera.advice import Advice, advise, method_notes, model_rows
from solera.diffing import open_all
from solera.stages import KINDS, all_problems, plan_stage, read_stage
from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_core.hub import split_adapter
from solera_core.plan import Plan
from solera_core.strict import load_yaml_documents
from solera_merge.config import MergeConfig

__all__ = ["is_settings", "kind_of_settings", "plan_models", "plan_settings", "print_advice"]


def is_settings(what: Sequence[str]) -> bool:
    """Whether one file is given, not models."""
    return len(what) == 1 and Path(what[0]).is_file()


def kind_of_settings(file: Path) -> str:
    """`recipe`, or the kind of stage that the settings in a file are of.

    Raises:
        ConfigError: none that can be told by its keys.
    """
    content, *more = load_yaml_documents(file) or [None]
    if more:
        return "merge"  # only merges come in several documents
    keys = set(content) if isinstance(content, Mapping) else set[str]()
    if len(keys) == 1 and (only := str(next(iter(keys)))) in KINDS:
        return only
    for kind, key in (("recipe", "stages"), ("merge", "merge_method"), ("moe", "experts"), ("distill", "teachers")):
        if key in keys:
            return kind
    raise ConfigError(
        f"{file}: is neither a recipe (`stages`) nor a merge (`merge_method`) nor a mixture (`experts`); "
        "its own command has --dry-run"
    )


def plan_settings(kind: str, file: Path, ctx: Context) -> tuple[Plan, list[dict[str, Any]], list[str]]:
    """The plan of one stage; of a merge also what its models are, and what is known about its method.

    Raises:
        InputError: all that is wrong, one line each.
    """
    try:
        config, base_dir = read_stage(kind, file)
    except ConfigError as e:
        raise all_problems(kind, file, e, ctx) from e
    here = Context(base_dir=base_dir, allow_pickle=ctx.allow_pickle, trust_remote_code=ctx.trust_remote_code)
    plan = plan_stage(kind, config, here)
    if not isinstance(config, MergeConfig):
        return plan, [], []
    models = open_all([str(row["what"]) for row in plan.reads], here)
    return plan, model_rows(models), method_notes(config)


def plan_models(refs: Sequence[str], base: str | None, ctx: Context) -> Advice:
    """What could be done with some models.

    Raises:
        ConfigError: a single model and no base.
        InputError: models that cannot be opened, one line each.
    """
    if len(refs) < 2 and base is None:
        raise ConfigError(f"plan: {refs[0]!r} is no file; give a recipe, or at least two models (or one and --base)")
    base_from = "named by --base"
    if base is None:
        under = {parts[0] if (parts := split_adapter(ref, ctx)) is not None else None for ref in refs}
        base, base_from = (next(iter(under)), "what the adapters lie on") if len(under) == 1 else (None, "")
    opened = open_all(list(dict.fromkeys([*refs, *([base] if base is not None else [])])), ctx)
    by_ref = {model.ref: model for model in opened}
    known = by_ref[base] if base is not None else None
    return advise([by_ref[ref] for ref in dict.fromkeys(refs) if ref != base], known, ctx, base_from=base_from)


def print_advice(advice: Advice) -> None:
    """Tables, sentences, and recipes to paste, on stdout."""
    from solera.console import print_models, print_rows, stdout_console

    console = stdout_console()
    print_models(advice.models)
    console.print(f"base: {advice.base or 'none'} ({advice.base_from})\n", markup=False)
    print_rows("measured on samples of the weights", advice.measured)
    print_rows("pairs: how their changes agree (0.5 is the sign conflict of unrelated changes)", advice.pairs)
    for problem in advice.problems:
        console.print(f"cannot be merged as they are: {problem}", markup=False)
    for finding in advice.findings:
        console.print(f"- {finding}", markup=False)
    for recipe in advice.recipes:
        comment = textwrap.fill(f"{recipe.title}: {recipe.why}", 100, initial_indent="# ", subsequent_indent="# ")
        console.print(f"\n{comment}\n{recipe.yaml}", markup=False, end="")

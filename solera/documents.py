"""Several merges in one file, each reading what earlier ones made: YAML documents, as mergekit-multi has them.

    name: halves                            # a name by which others call it as a model
    merge_method: slerp
    ...
    ---
    merge_method: ties                      # the one without a name (else the last one) is the output
    models: [{model: halves}, ...]

All of them are planned before the first one runs. What the named ones make lies beside the output while the merge goes
on, is used again after a kill, and is removed at the end; or it is kept where one asks for it.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from solera.planning import combined, plan_stages
from solera.recipe import Recipe, parse_recipe
from solera.stages import Stage
from solera_core.context import Context
from solera_core.errors import ConfigError, ResourceError
from solera_core.plan import Plan
from solera_core.provenance import InputRecord, read_provenance
from solera_core.staging import check_apart, check_target, disk_errors, require_disk
from solera_core.strict import Strict, parse
from solera_merge.config import MergeConfig
from solera_merge.plan import make_plan, plan_key
from solera_merge.run import merge

__all__ = ["DocumentsConfig", "merge_documents", "plan_documents"]

_OUTPUT: Final = "output"
"""What the document without a name is called in plans and messages."""

_MADE: Final = Path("stages")
"""Where `plan_stages` says that the merges are."""


class DocumentsConfig(Strict):
    """Several merges, of which one is the output.

    Attributes:
        documents: merge recipes, each with a `name` (all but one of them).
        keep_intermediate: a directory for what the named ones make. It is no part of the recipe: it changes no result.
    """

    documents: list[dict[str, Any]] = Field(min_length=1)
    keep_intermediate: Path | None = Field(default=None, exclude=True)


def plan_documents(config: DocumentsConfig, ctx: Context) -> Plan:
    """The plans of all documents, one below the other; sizes of what is not made yet are those of their own plans.

    Raises:
        ConfigError: names that are missing or given twice, merges that read each other in a circle, or that nothing
            reads although they are not kept.
        InputError: whatever one of the merges would refuse before it computes.
    """
    recipe, output = _recipe(config, ctx)
    plans = _plans(recipe, output, config, ctx)
    return combined(f"merge in {len(plans)} stages: {', '.join(plans)}", plans, made=_MADE)


def merge_documents(config: DocumentsConfig, out: Path, ctx: Context) -> Path:
    """Run every merge after those whose results it reads; the last makes `out`.

    What a killed run has finished is not made again.

    Raises:
        InputError: as `plan_documents`, or as `solera_merge.run.merge`, which also says what else can go wrong.
    """
    recipe, final = _recipe(config, ctx)
    check_target(out, overwrite=ctx.overwrite)
    work = config.keep_intermediate or out.parent / f".{out.name}.solera-stages"
    plans = _plans(recipe, final, config, ctx)
    reads = combined("merge", plans, made=_MADE).reads
    check_apart(out, [Path(row["path"]) for row in reads], [work])
    _check_room({name: plan.disk_bytes for name, plan in plans.items()}, final, out, work)
    made: dict[str, Path] = {}
    try:
        for stage in recipe.stages:
            here = replace(ctx, models={**ctx.models, **made})
            ctx.progress.note(f"[{recipe.stages.index(stage) + 1}/{len(recipe.stages)}] {stage.name}")
            if stage.name == final:
                merge(_merge_config(stage), out, here, record=lambda r, i: _record(config, made, r, i))
            else:
                made[stage.name] = _intermediate(stage, work, here)
    except (KeyboardInterrupt, ResourceError):
        raise  # the same command goes on from what is finished
    except BaseException:
        _remove(work, config)
        raise
    _remove(work, config)
    return out


def _check_room(sizes: Mapping[str, int], final: str, out: Path, work: Path) -> None:
    """Raise DiskFullError or TargetError for what would be in the way or too large."""
    needed = 0
    for name in sizes.keys() - {final}:
        check_target(work / name, overwrite=True)
        needed += 0 if (work / name).is_dir() else sizes[name]
    if work.parent.resolve() == out.parent.resolve():
        require_disk(out, sizes[final] + needed)
    else:
        require_disk(work / final, needed)
        require_disk(out, sizes[final])


def _recipe(config: DocumentsConfig, ctx: Context) -> tuple[Recipe, str]:
    """The merges as stages, each after those that it reads, and the name of the output."""
    nodes: dict[str, Any] = {}
    final: str | None = None
    for i, document in enumerate(config.documents):
        name = document.get("name", _OUTPUT)
        if not isinstance(name, str):
            raise ConfigError(f"documents.{i}: name: expected a word, found {name!r}")
        if name in nodes:
            what = f"the name {name!r} is given twice" if "name" in document else "more than one has no name"
            raise ConfigError(f"documents.{i}: {what}; each merge but the output needs a name of its own")
        final = name if "name" not in document else final
        nodes[name] = {"merge": {key: value for key, value in document.items() if key != "name"}}
    output = final or next(reversed(nodes))
    problems: list[str] = []
    for name, node in nodes.items():
        try:
            parse(MergeConfig, node["merge"], where=f"documents: {name}")
        except ConfigError as e:
            problems.append(str(e))
    if problems:
        raise ConfigError("\n".join(problems))
    recipe = parse_recipe(
        {"solera": 1, "seed": ctx.seed, "stages": nodes}, base_dir=ctx.base_dir, where="documents", seed=ctx.seed
    )
    ordered = [*(s for s in recipe.stages if s.name != output), recipe.stage(output)]
    return replace(recipe, stages=tuple(ordered)), output


def _plans(recipe: Recipe, output: str, config: DocumentsConfig, ctx: Context) -> dict[str, Plan]:
    """The plan of every merge, by name."""
    plans = plan_stages(recipe, Path(), ctx)  # first: what is misspelt is not read, and then seems to be unused
    used = {output}
    for stage in reversed(recipe.stages):
        used |= set(recipe.inputs(stage)) if stage.name in used else set()
    unused = [stage.name for stage in recipe.stages if stage.name not in used]
    if unused and config.keep_intermediate is None:
        raise ConfigError(
            f"documents: {', '.join(map(repr, unused))} would be made and thrown away, because the output "
            f"({output!r}) is not made of it; remove it, or keep it with --keep-intermediate"
        )
    return plans


def _merge_config(stage: Stage) -> MergeConfig:
    assert isinstance(stage.config, MergeConfig)
    return stage.config


def _intermediate(stage: Stage, work: Path, ctx: Context) -> Path:
    """What a named merge makes; made now, unless an earlier run has made just that."""
    config, path, key_file = _merge_config(stage), work / stage.name, work / f".{stage.name}.key.json"
    key = {"plan": plan_key(*make_plan(config, ctx)), "seed": ctx.seed, "compat": ctx.compat}
    if path.is_dir() and key_file.is_file():
        try:
            record = json.loads(key_file.read_text(encoding="utf-8"))
        except ValueError:
            record = {}
        if record == {**key, "digest": read_provenance(path)["digest"]}:
            ctx.progress.note(f"{stage.name}: is there already")
            return path
    merge(config, path, replace(ctx, overwrite=True))
    with disk_errors(work):
        record = {**key, "digest": read_provenance(path)["digest"]}
        key_file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return path


def _record(
    config: DocumentsConfig, made: Mapping[str, Path], recipe: Mapping[str, Any], inputs: Sequence[InputRecord]
) -> tuple[Mapping[str, Any], list[InputRecord]]:
    """All documents, and what went in from outside: the intermediate results will not be there any more."""
    del recipe
    records = [InputRecord(**item) for path in made.values() for item in read_provenance(path)["inputs"]]
    outside = {item.ref: item for item in (*records, *inputs) if not set(item.ref.split("+")) & made.keys()}
    return config.model_dump(mode="json"), list(outside.values())


def _remove(work: Path, config: DocumentsConfig) -> None:
    if config.keep_intermediate is None:
        shutil.rmtree(work, ignore_errors=True)

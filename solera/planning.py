"""The plan of every stage of a recipe, also of those whose inputs other stages have yet to make."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from solera.publish import WORKING_BYTES, PublishConfig
from solera.recipe import Recipe
from solera.skeleton import write_skeleton
from solera.stages import Stage, plan_stage
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import ConfigError, ResourceError, SoleraError
from solera_core.plan import Plan

__all__ = ["combined", "plan_stages", "total"]


def plan_stages(recipe: Recipe, out: Path, ctx: Context, *, made: Mapping[str, Path] | None = None) -> dict[str, Plan]:
    """The plan of every stage, by name. Reads headers, texts and suites; writes headers into a temporary folder only.

    Args:
        recipe: what would run.
        out: the run directory, which the plans name.
        ctx: as for the run.
        made: outputs of stages that exist already; the others are stood in for by their headers.

    Raises:
        SoleraError: whatever the stages would refuse before they compute: of every stage whose inputs can be planned,
            one message each.
    """
    made = made or {}
    plans: dict[str, Plan] = {}
    errors: list[SoleraError] = []
    stages = out / "stages"
    with tempfile.TemporaryDirectory(prefix="solera-plan-") as scratch:
        known: dict[str, Path] = {}
        for stage in recipe.stages:
            here = replace(ctx, seed=recipe.seed, base_dir=recipe.base_dir, models={**ctx.models, **known})
            waiting = [name for name in recipe.inputs(stage) if name not in known]
            if waiting:  # for a stage that was refused
                continue
            try:
                plan = _outline(stage, here) if stage.kind == "publish" else plan_stage(stage.kind, stage.config, here)
                if stage.name not in made:
                    write_skeleton(stage, Path(scratch) / stage.name, here)
            except SoleraError as e:
                text = str(e).replace(scratch, str(stages))
                errors.append(type(e)(f"stage {stage.name!r} ({stage.kind}): {text}"))
                continue
            known[stage.name] = made.get(stage.name, Path(scratch) / stage.name)
            plans[stage.name] = plan.renamed(scratch, str(stages))
    if errors:
        first = next((e for e in errors if isinstance(e, ResourceError)), errors[0])
        if len(errors) == 1 or isinstance(first, ResourceError):
            raise first
        raise ConfigError("\n".join(map(str, errors)))
    return plans


def total(plans: Mapping[str, Plan]) -> dict[str, int]:
    """What all of them need: the disk of all together, the memory of the hungriest."""
    return {
        "disk_bytes": sum(plan.disk_bytes for plan in plans.values()),
        "memory_bytes": max((plan.memory_bytes for plan in plans.values()), default=0),
    }


def combined(stage: str, plans: Mapping[str, Plan], *, made: Path) -> Plan:
    """One plan of several, one below the other; what one of them makes in `made` is not read from outside."""
    own = {str(made / name) for name in plans}
    rows = {
        part: [{"stage": name, **row} for name, plan in plans.items() for row in getattr(plan, part)]
        for part in ("reads", "writes", "rows")
    }
    needed = total(plans)
    return Plan(
        stage=stage,
        reads=[row for row in rows["reads"] if row["path"] not in own],
        writes=rows["writes"],
        memory_bytes=needed["memory_bytes"],
        disk_bytes=needed["disk_bytes"],
        parameters={f"{name}.{key}": value for name, plan in plans.items() for key, value in plan.parameters.items()},
        rows=rows["rows"],
        warnings=[f"{name}: {warning}" for name, plan in plans.items() for warning in plan.warnings],
    )


def _outline(stage: Stage, ctx: Context) -> Plan:
    """Of a publish stage: what it says about the model needs the finished run, its size does not."""
    config = stage.config
    assert isinstance(config, PublishConfig)
    model = open_checkpoint(config.model, ctx)
    size = sum(info.nbytes for info in model.tensors.values())
    return Plan(
        stage="publish",
        reads=[{"what": config.model, "path": str(model.path), "bytes": size}],
        writes=[
            {"what": "weights, as hard links where the file system has them", "bytes": size},
            {"what": "card, licences, evidence", "bytes": None},
        ],
        memory_bytes=WORKING_BYTES,
        disk_bytes=size,
        parameters={**config.model_dump(mode="json"), "endpoint": os.environ.get("HF_ENDPOINT", "the hub's own")},
    )

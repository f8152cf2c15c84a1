"""The merge stage: a recipe and models in, a verified checkpoint out."""

from pathlib import Path

from solera_core.context import Context
from solera_core.output import check_output, input_record, write_metadata, write_provenance
from solera_core.plan import Plan
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_core.writer import CheckpointWriter
from solera_merge.config import MergeConfig
from solera_merge.engine import execute
from solera_merge.plan import describe, make_plan, worker_threads

__all__ = ["merge", "plan_merge"]


def plan_merge(config: MergeConfig, ctx: Context) -> Plan:
    """What `merge` would do, from configs and headers alone; no weight is read and nothing is written.

    Raises:
        InputError: everything that is wrong with the recipe and the models as far as headers tell, one line each.
    """
    plan, models = make_plan(config, ctx)
    return describe(plan, config, models, ctx)


def merge(config: MergeConfig, out: Path, ctx: Context) -> Path:
    """Merge models into a new checkpoint at `out`; the same recipe, inputs and seed give the same bytes.

    Raises:
        InputError: as `plan_merge`; or the target is in the way; or an input holds NaN or infinity.
        DiskFullError: found before anything is computed.
        VerificationError: what was written cannot be loaded as it should be (a bug, or a model that its own config
            does not describe).
    """
    check_target(out, overwrite=ctx.overwrite)
    plan, models = make_plan(config, ctx)
    check_apart(out, [directory for checkpoint in models.checkpoints for directory in checkpoint.directories])
    for warning in plan.warnings:
        ctx.progress.note(warning)
    require_disk(out.parent, plan.disk_bytes)
    with staged(out, overwrite=ctx.overwrite) as staging:
        with CheckpointWriter(staging, plan.specs) as writer:
            execute(plan.tensors, models.checkpoints, writer, threads=worker_threads(ctx), progress=ctx.progress)
            digests = writer.finish()
        write_metadata(staging, config=plan.config, sidecars=plan.sidecars)
        checks = check_output(staging, trust_remote_code=ctx.trust_remote_code)
        write_provenance(
            staging,
            kind="merge",
            recipe=config.model_dump(mode="json", exclude_none=True),
            seed=ctx.seed,
            inputs=[input_record(checkpoint) for checkpoint in models.checkpoints],
            tensors=digests,
            checks=checks,
        )
    return out

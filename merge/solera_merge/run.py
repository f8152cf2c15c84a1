"""The merge stage: a recipe and models in, a verified checkpoint out."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solera_core.context import Context
from solera_core.output import (
    check_output,
    check_weights,
    input_record,
    tokenizer_record,
    write_metadata,
    write_provenance,
)
from solera_core.plan import Plan
from solera_core.reload_check import ReloadCheck
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_core.writer import CheckpointWriter
from solera_merge.adapters.merge import Record, merge_adapters, plan_merge_adapters
from solera_merge.compat import mergekit_versions
from solera_merge.config import MergeConfig
from solera_merge.drift import drift_report
from solera_merge.engine import execute
from solera_merge.models import Models
from solera_merge.plan import (
    COPY,
    MergePlan,
    budget_bytes,
    describe,
    make_plan,
    plan_key,
    require_memory,
    worker_threads,
)

if TYPE_CHECKING:
    from solera_merge.torch_twins import Device

__all__ = ["merge", "plan_merge"]

_SHOWN = 5  # outliers named while the merge ends; solera.json has all

# What config.json may say differently about equal models: number format, and who wrote it.
_NOT_FORM = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


def plan_merge(config: MergeConfig, ctx: Context) -> Plan:
    """What `merge` would do, from configs and headers alone; no weight is read and nothing is written.

    (Small files of models on the hub, adapters and pickled weights go into the hub's cache.)

    Raises:
        InputError: everything that is wrong with the recipe and the models as far as headers tell, one line each.
    """
    if config.adapter is not None:
        return plan_merge_adapters(config, ctx)
    plan, models = make_plan(config, ctx)
    return describe(plan, config, models, ctx)


def merge(config: MergeConfig, out: Path, ctx: Context, *, record: Record | None = None) -> Path:
    """Merge models into a new checkpoint at `out`; the same recipe, inputs and seed give the same bytes.

    Models on the hub are downloaded when everything that can be checked beforehand is right, at the commit that was
    planned. A run that was killed goes on where it stood when the same one is started again: tensors that it had
    finished are hashed, not merged again.

    Args:
        config: the recipe.
        out: a directory that does not exist.
        ctx: threads, memory, permissions.
        record: what solera.json is to say of recipe and inputs, from these two as they are (the default).

    Raises:
        InputError: as `plan_merge`; or the target is in the way; or an input holds NaN or infinity, or was changed.
        ResourceError: a tensor needs more memory than allowed, or the disk is too small: found before any computation
            and any download of weights; or the hub fails during that download.
        VerificationError: what was written cannot be loaded as it should be (a bug, or a model that its own config
            does not describe).
    """
    if config.adapter is not None:
        return merge_adapters(config, out, ctx, record=record)
    check_target(out, overwrite=ctx.overwrite)
    plan, models = make_plan(config, ctx)
    read = [*models.checkpoints, *([] if models.tokenizer is None else [models.tokenizer])]
    check_apart(out, [directory for checkpoint in read for directory in checkpoint.directories])
    for warning in plan.warnings:
        ctx.progress.note(warning)
    require_memory(plan.tensors, ctx)
    _fetch(models, plan, out, ctx)
    key = plan_key(plan, models)
    with (
        staged(out, overwrite=ctx.overwrite, resume_key=key, flush=ctx.flush) as staging,
        CheckpointWriter(staging, plan.specs, early_flush=ctx.flush) as writer,
        ExitStack() as beside,
    ):
        if not models.raw:
            write_metadata(staging, config=plan.config, sidecars=plan.sidecars, files=plan.files)
        reload = _reload_check(staging, plan, models, ctx, beside)
        execute(
            plan.tensors,
            models.checkpoints,
            writer,
            threads=worker_threads(ctx),
            memory_bytes=budget_bytes(ctx),
            progress=ctx.progress,
            device=_device(plan, ctx),
        )
        inputs = [input_record(checkpoint, attest=ctx.attest) for checkpoint in models.inputs]
        inputs += [] if models.tokenizer is None else [tokenizer_record(models.tokenizer)]
        for checkpoint in models.inputs:
            checkpoint.require_unchanged()
        digests = writer.finish()
        checks = (
            check_weights(staging)
            if models.raw
            else check_output(staging, reload=False, trust_remote_code=ctx.trust_remote_code)
        )
        drift = drift_report({n: d for n in digests if (d := writer.annotation(n)) is not None})
        for name, what in list(drift["outliers"].items())[:_SHOWN]:
            ctx.progress.note(f"{name}: {what}")
        checks["drift"] = drift
        checks["transformers"] = reload.result() if isinstance(reload, ReloadCheck) else reload
        recipe: Mapping[str, Any] = config.model_dump(mode="json", exclude_none=True)
        if record is not None:
            recipe, inputs = record(recipe, inputs)
        write_provenance(
            staging,
            kind="merge",
            recipe=recipe,
            seed=ctx.seed,
            inputs=inputs,
            tensors=digests,
            checks=checks,
            compat=None if ctx.compat is None else {"with": ctx.compat, **mergekit_versions()},
        )
    return out


def _fetch(models: Models, plan: MergePlan, out: Path, ctx: Context) -> None:
    """Download what is still on the hub, if the disks have room for that and for the output."""
    require_disk(out, plan.disk_bytes, downloads={c.path: c.missing_bytes for c in models.checkpoints})
    for checkpoint in models.checkpoints:
        if nbytes := checkpoint.missing_bytes:
            ctx.progress.note(f"{checkpoint.ref}: downloading {nbytes / 1e9:.3f} GB")
        checkpoint.fetch()


def _device(plan: MergePlan, ctx: Context) -> "Device | None":
    """Where the hot methods compute; says which ones it does not have."""
    if ctx.device == "cpu":
        return None
    from solera_merge.torch_twins import open_device

    device = open_device(ctx.device)
    for method in dict.fromkeys(tensor.method for tensor in plan.tensors):
        if method != COPY and not device.has(method):
            ctx.progress.note(f"{method}: is not made for {ctx.device}, and runs on the CPU")
    return device


def _reload_check(
    staging: Path, plan: MergePlan, models: Models, ctx: Context, beside: ExitStack
) -> ReloadCheck | Mapping[str, str]:
    """A check that runs beside the merge, or the reason why none is needed."""
    if models.raw:
        return {"skipped": "there is no config.json"}
    if not ctx.reload_check:
        return {"skipped": "--no-reload-check"}
    if (ref := _input_of_the_same_form(plan, models)) is not None:
        return {"skipped": f"names, shapes and config are those of {ref}"}
    return beside.enter_context(ReloadCheck(staging, trust_remote_code=ctx.trust_remote_code))


def _input_of_the_same_form(plan: MergePlan, models: Models) -> str | None:
    """An input whose names, shapes and config the output has: it loads exactly as that one does."""
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    form = _form(plan.config)
    for checkpoint in models.checkpoints:
        if not checkpoint.as_stored:
            continue
        if _form(checkpoint.config) == form and {n: t.shape for n, t in checkpoint.tensors.items()} == shapes:
            return checkpoint.ref
    return None


def _form(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_FORM}

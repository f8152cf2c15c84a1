"""A mixture of experts that is trained when it is built: its router by itself, then all of it by the specialists.

    built -> trained (router, loss of the language model) -> healed (KL from the specialist of each text)
             start (the best merge) -> control (a dense model, taught in the same way for the same tokens)

Each step is a stage that could stand in a recipe. They lie in a folder beside the output while the work goes on; after
a kill the same command goes on from what is finished. The text of every domain is split as the router's fit splits it,
so nothing is measured on text that was trained on.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from solera.pipeline import run_recipe
from solera.planning import combined, plan_stages
from solera.preflight import check_inputs
from solera.recipe import Recipe, parse_recipe
from solera.stages import model_references
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.data import DataSource, Document, Text, encode
from solera_core.errors import ResourceError
from solera_core.hub import split_adapter
from solera_core.output import check_output, write_provenance
from solera_core.plan import Plan
from solera_core.provenance import BASE_DIR_FILE, FILE_NAME, InputRecord, read_provenance
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_merge.figures import rounded
from solera_merge.moe.calibration import read_domains
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.statistics_file import STATISTICS_FILE
from solera_merge.moe.trunk import best_dense
from solera_merge.moe.trunk_config import candidates

__all__ = ["build_trained", "control_of", "is_trained", "plan_trained"]

_TRUNK: Final = ["router", "attention", "norms", "embeddings"]
_LOOKS: Final = 20
"""Looks at the held-out text while the router trains."""


def is_trained(config: MoeConfig) -> bool:
    """Whether anything trains."""
    return config.train is not None or config.heal is not None


def control_of(out: Path) -> Path:
    """Where the dense control goes."""
    return out.with_name(f"{out.name}-control")


def plan_trained(config: MoeConfig, ctx: Context) -> Plan:
    """The plans of all steps, one below the other; the control is planned as the average of the experts.

    Raises:
        SoleraError: whatever one of the steps would refuse before it computes.
    """
    with tempfile.TemporaryDirectory(prefix="solera-text-") as scratch:
        text = _write_text(config, Path(scratch), ctx, most=None)
        recipe = _recipe(config, text, ctx, start=_some_merge(config))
        check_inputs(recipe, Path(scratch) / "run", ctx)
        plans = plan_stages(recipe, Path(scratch) / "run", ctx)
        return combined("moe", plans, made=Path(scratch) / "run" / "stages").renamed(scratch, ".")


def build_trained(config: MoeConfig, out: Path, ctx: Context) -> Path:
    """Build, train and heal a MoE into `out`; a control goes beside it, to `control_of(out)`.

    Raises:
        SoleraError: as `solera_merge.moe.build.build_moe` and `solera_distill.run.distill`. What is finished stays for
            the next try where the machine was at fault (or Ctrl-C), else nothing is left behind.
    """
    has_control = config.heal is not None and config.heal.control
    check_target(out, overwrite=ctx.overwrite)
    if has_control:
        check_target(control_of(out), overwrite=ctx.overwrite)
    plan = plan_trained(config, ctx)
    work = out.parent / f".{out.name}.solera-stages"
    models = [Path(row["path"]) for row in plan.reads if row.get("kind") == "model"]
    for target in (out, control_of(out)) if has_control else (out,):
        check_apart(target, models, [work])
    require_disk(out, plan.disk_bytes)
    try:
        text = _write_text(config, work / "text", ctx, most=config.router.held_out_tokens)
        steps = {stage.name: stage.path for stage in run_recipe(_recipe(config, text, ctx), work, ctx).stages}
        compared: dict[str, Any] = {}
        if has_control:
            here = replace(ctx, overwrite=True)
            start, compared = best_dense(config, work / "merges", here)
            recipe = _recipe(config, text, ctx, start=start)
            steps = {stage.name: stage.path for stage in run_recipe(recipe, work, ctx).stages}
        checks = _checks(config, text, steps, compared, ctx)
        ctx.progress.note(checks.get("worth", "trained"))
        _write(config, steps, checks, out, ctx)
    except (KeyboardInterrupt, ResourceError):
        raise  # the same command goes on from what is finished
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)
    return out


def _write_text(config: MoeConfig, directory: Path, ctx: Context, *, most: int | None) -> dict[str, tuple[str, str]]:
    """The text of every domain in two files, to train on and held out, by expert.

    With `most`, no more held-out documents than hold so many tokens, as the router is measured on: it is looked at 20
    times while the router trains, and all of it could take longer than the training.
    """
    directory.mkdir(parents=True, exist_ok=True)
    router = config.router
    data = {expert.name: router.data[expert.name] for expert in config.experts}  # in one order, however it is written
    domains, _ = read_domains(data, base_dir=ctx.base_dir, holdout=router.holdout, seed=ctx.seed)
    files: dict[str, tuple[str, str]] = {}
    for i, domain in enumerate(domains):
        pair = directory / f"{i}.jsonl", directory / f"{i}-held-out.jsonl"
        held_out = domain.held_out if most is None else _first(domain.held_out, most, config, ctx)
        for file, documents in zip(pair, (domain.fit, held_out), strict=True):
            rows = [json.dumps(_row(document), ensure_ascii=False) + "\n" for document in documents]
            file.write_text("".join(rows), encoding="utf-8")
        files[domain.name] = str(pair[0].resolve()), str(pair[1].resolve())
    return files


def _first(documents: Sequence[Document], tokens: int, config: MoeConfig, ctx: Context) -> list[Document]:
    """The first documents that hold so many tokens; at least one."""
    from solera_core.causal_lm import load_tokenizer

    assert config.base_model is not None
    tokenizer: Any = load_tokenizer(open_checkpoint(config.base_model, ctx).path)
    tokenizer.model_max_length = 1 << 40  # its warning of long documents would mislead: they are cut
    found: list[Document] = []
    for document in documents:
        if tokens <= 0:
            break
        found.append(document)
        tokens -= len(encode(document, tokenizer, add_eos=True).ids)
    return found


def _row(document: Document) -> dict[str, Any]:
    content = document.content
    if not isinstance(content, Text):
        return {"messages": [{"role": role, "content": text} for role, text in content.turns]}
    if content.prompt:
        return {"prompt": content.prompt, "completion": content.completion}
    return {"text": content.completion}


def _recipe(
    config: MoeConfig, text: Mapping[str, tuple[str, str]], ctx: Context, *, start: Mapping[str, Any] | None = None
) -> Recipe:
    """All steps as stages; those of the control where it has something to start from."""
    data = {name: [{"path": pair[0]}] for name, pair in text.items()}
    held_out = {name: [{"path": pair[1]}] for name, pair in text.items()}
    common = {"data": data, "eval_data": held_out, "sequence_tokens": config.router.sequence_tokens}
    built = config.model_dump(mode="json", exclude={"train", "heal"})
    nodes: dict[str, Any] = {"built": {"moe": _here(built, ctx)}}
    last = "built"
    if (train := config.train) is not None:
        look = max(train.tokens // _LOOKS, train.tokens_per_step)
        settings = train.model_dump() | {"parts": ["router"], "keep_best": True, "save_every": look}
        nodes["trained"] = {"tune": {"model": last, **common, **settings}}
        last = "trained"
    if (heal := config.heal) is not None:
        settings = heal.model_dump(exclude={"control", "parts", "ce", "balance"})
        taught = {
            **common,
            **settings,
            "teachers": [{"model": e.model, "domain": e.name} for e in config.experts],
            "objective": {"kl": 1.0, "ce": heal.ce},
        }
        taught = _here(taught, ctx)
        parts = _TRUNK if heal.parts == "router+trunk" else "all"
        nodes["healed"] = {"distill": {**taught, "student": {"from": last}, "parts": parts, "balance": heal.balance}}
        if start is not None:
            nodes["start"] = {"merge": _here(start, ctx)}
            nodes["control"] = {"distill": {**taught, "student": {"from": "start"}}}
    return parse_recipe({"solera": 1, "seed": ctx.seed, "stages": nodes}, base_dir=ctx.base_dir, where="moe")


def _some_merge(config: MoeConfig) -> Mapping[str, Any] | None:
    """A merge of the shape that the control has."""
    if config.heal is None or not config.heal.control:
        return None
    recipe = candidates("average", config.base_model, [expert.model for expert in config.experts])["average"]
    assert recipe is not None
    return recipe.model_dump(mode="json", exclude_none=True)


def _here(settings: Any, ctx: Context, key: str = "") -> Any:
    """Settings in which stages and directories are called by their paths, so that none is taken for a step of ours."""
    if isinstance(settings, Mapping):
        return {k: _here(v, ctx, k) for k, v in settings.items()}
    if isinstance(settings, list):
        return [_here(item, ctx, key) for item in settings]
    return _place(settings, ctx) if key in ("model", "base_model") and isinstance(settings, str) else settings


def _place(reference: str, ctx: Context) -> str:
    if (pair := split_adapter(reference, ctx)) is not None:
        return "+".join(_place(part, ctx) for part in pair)
    place = ctx.models.get(reference, ctx.base_dir / Path(reference).expanduser())
    return str(place.resolve()) if place.is_dir() else reference


def _checks(
    config: MoeConfig,
    text: Mapping[str, tuple[str, str]],
    steps: Mapping[str, Path],
    compared: Mapping[str, Any],
    ctx: Context,
) -> dict[str, Any]:
    """What was measured on held-out text: nats a token, by domain and the mean over domains."""
    from solera_distill.heldout import nll_of

    found: dict[str, Any] = {}
    if config.train is not None:
        record = read_provenance(steps["trained"])["checks"]
        found["train"] = {"kept_at_tokens": record["kept_at_tokens"], **_before_and_after(record)}
    if config.heal is None:
        return found
    found["heal"] = {"tokens": config.heal.tokens, "parts": config.heal.parts} | _before_and_after(
        read_provenance(steps["healed"])["checks"]
    )
    own = {
        expert.name: rounded(
            nll_of(
                expert.model,
                [DataSource(path=text[expert.name][1], domain=expert.name)],
                config.router.sequence_tokens,
                ctx,
            )
        )
        for expert in config.experts
    }
    found["specialists"] = {"nll": own, "mean": rounded(_mean(own))}
    if "control" in steps:
        found["control"] = {
            "started_as": compared["chosen"],
            "merges": compared["nll"],
            **_before_and_after(read_provenance(steps["control"])["checks"]),
        }
        found["worth"] = _worth(found, _bytes(steps["healed"]) / _bytes(steps["control"]))
    else:
        found["worth"] = "no control was trained, so nothing says whether the MoE is worth its bytes"
    return found


def _before_and_after(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        domains = record[f"heldout_nll_{when}_by_domain"]
        found[f"nll_{when}"] = {name: rounded(nll) for name, nll in domains.items()}
        found[f"mean_{when}"] = rounded(_mean(domains))
    return found


def _mean(domains: Mapping[str, float]) -> float:
    return sum(domains.values()) / len(domains)


def _bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def _worth(found: Mapping[str, Any], size: float) -> str:
    """In a sentence: whether the MoE is better than a dense model taught in the same way."""
    moe, dense, best = found["heal"]["mean_after"], found["control"]["mean_after"], found["specialists"]["mean"]
    figures = f"{moe:.3f} against {dense:.3f} nats a token (the specialists, each on its own text: {best:.3f})"
    if moe < dense:
        return f"the healed MoE is better than the dense control, {figures}, at {size:.1f} times its bytes"
    return f"the MoE is not worth its bytes: {figures}, and it has {size:.1f} times as many; take the control"


def _write(config: MoeConfig, steps: Mapping[str, Path], checks: Mapping[str, Any], out: Path, ctx: Context) -> None:
    """Move what was made into place, with a record that tells all steps."""
    built = read_provenance(steps["built"])
    recipe = config.model_dump(mode="json")
    written = {_place(ref, ctx): ref for ref in model_references(config)}
    built = _as_written(built, {**written, **{f"trunk: {place}": f"trunk: {ref}" for place, ref in written.items()}})
    inputs = [InputRecord(**item) for item in built["inputs"]]
    with ExitStack() as targets:
        for name, target in (("control", control_of(out)), ("healed" if config.heal else "trained", out)):
            if name not in steps:
                continue
            staging = targets.enter_context(staged(target, overwrite=ctx.overwrite))
            _copy(steps[name], staging)
            if target == out:
                for step in {"trained", "healed"} & steps.keys():
                    shutil.copy(steps[step] / "training.jsonl", staging / f"{step}.jsonl")
            said = {**built["checks"], **checks} if target == out else dict(checks["control"])
            write_provenance(
                staging,
                kind="moe" if target == out else "control",
                recipe=recipe,
                seed=ctx.seed,
                inputs=inputs,
                tensors=None,
                checks={**said, **check_output(staging, trust_remote_code=ctx.trust_remote_code)},
            )


def _as_written(value: Any, written: Mapping[str, str]) -> Any:
    """A record in which models are called as the recipe calls them, not by where they were found."""
    if isinstance(value, Mapping):
        return {key: _as_written(item, written) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_written(item, written) for item in value]
    return written.get(value, value) if isinstance(value, str) else value


def _copy(made: Path, target: Path) -> None:
    """The files of a model, without its record and without what is no longer true of it."""
    for file in made.iterdir():
        if file.name in (FILE_NAME, "training.jsonl", Path(STATISTICS_FILE).parts[0], BASE_DIR_FILE):
            continue
        if file.is_dir():
            shutil.copytree(file, target / file.name)
            continue
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)

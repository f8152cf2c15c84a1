"""The stage `moe-extract-lora`: specialists as LoRA adapters of their base, and a router over requests beside them.

    out/math/, out/code/   one peft adapter each, of the smallest rank that is as good as the best tried
    out/route.json, ...    the router: solera route's own, over base + adapter

No stock MoE: the router looks at a whole request, once, and peft or vLLM apply the adapter that it names.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from solera_core.causal_lm import load_model
from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import data_path
from solera_core.errors import ConfigError
from solera_core.fold import loadable
from solera_core.lora import WEIGHTS_FILE
from solera_core.output import data_record, input_record, write_provenance
from solera_core.plan import Plan
from solera_core.provenance import BASE_DIR_FILE
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_core.strict import parse
from solera_core.threads import torch_threads
from solera_merge.adapters.extract import ExtractConfig, extract_lora, plan_extract
from solera_merge.figures import rounded
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.routing import mean_nll
from solera_merge.moe.size.config import ExtractExpertsConfig, SpecialistConfig
from solera_merge.moe.size.text import encode_text, read_text
from solera_merge.route.build import build_route, plan_route, route_skeleton
from solera_merge.route.config import RouteConfig

__all__ = ["choose_rank", "extract_experts", "extract_skeleton", "plan_extract_experts"]

_NOTE: Final = (
    "adapters and a router over requests: no MoE checkpoint, nothing switches within a text. peft and vLLM load the "
    "adapters; solera's RoutedModels, solera eval and distillations take the directory as a route"
)


@dataclass(frozen=True)
class _Tried:
    """What a specialist's adapters do to its own held-out text, by rank, in nats a token."""

    losses: dict[int, float]
    nbytes: dict[int, int]
    full: float
    rank: int


def plan_extract_experts(config: ExtractExpertsConfig, ctx: Context) -> Plan:
    """What would be read, run and written; from headers and the text files, without weights.

    Raises:
        SoleraError: everything that is wrong with models and texts and that headers and text files can tell.
    """
    route = plan_route(_route_config(config, adapters=False), ctx)
    _, warnings = read_text(config, ctx)
    adapters = {
        s.name: plan_extract(_extract_config(config, s.model, max(config.ranks)), ctx) for s in config.specialists
    }
    nbytes = {name: int(plan.writes[0]["bytes"]) for name, plan in adapters.items()}
    base = open_checkpoint(config.base_model, ctx)
    whole = sum(info.nbytes for info in base.tensors.values())
    return Plan(
        stage="moe-extract-lora",
        reads=route.reads,
        writes=[
            *({"what": f"{name}/{WEIGHTS_FILE}, at most", "bytes": n} for name, n in nbytes.items()),
            *route.writes,
        ],
        memory_bytes=max(route.memory_bytes, *(plan.memory_bytes for plan in adapters.values())),
        disk_bytes=sum(nbytes.values()) + len(config.ranks) * max(nbytes.values()) + whole + route.disk_bytes,
        parameters=config.model_dump(mode="json"),
        rows=[
            {"specialist": s.name, "model": s.model, "ranks tried": ", ".join(map(str, config.ranks))}
            for s in config.specialists
        ],
        warnings=[*warnings, *route.warnings],
    )


def extract_experts(config: ExtractExpertsConfig, out: Path, ctx: Context) -> Path:
    """Write adapters and router into `out`, with the held-out loss of every rank tried.

    Raises:
        SoleraError: models that do not fit each other, too little text, a target in the way. Nothing is left behind.
    """
    check_target(out, overwrite=ctx.overwrite)
    plan = plan_extract_experts(config, ctx)
    base = open_checkpoint(config.base_model, ctx)
    specialists = {s.name: open_checkpoint(s.model, ctx) for s in config.specialists}
    models = [base, *specialists.values()]
    sources = [source for given in config.data.values() for source in given]
    texts = [path for source in sources if (path := data_path(source, ctx.base_dir)) is not None]
    check_apart(out, [directory for model in models for directory in model.directories], texts)
    require_disk(out, plan.disk_bytes)
    domains, _ = read_text(config, ctx)
    text = encode_text(domains, base, config)
    held_out = dict(zip(text.names, text.held_out, strict=True))
    records = [input_record(m, n, attest=ctx.attest) for n, m in zip(("base", *specialists), models, strict=True)]
    with torch_threads(ctx.threads), staged(out, overwrite=ctx.overwrite, flush=ctx.flush) as staging:
        losses = _losses(base, [held_out[name] for name in specialists], staging)
        before = dict(zip(specialists, losses, strict=True))
        tried = {s.name: _try_ranks(config, s, held_out[s.name], staging, ctx) for s in config.specialists}
        warnings = list(dict.fromkeys([*plan.warnings, *text.warnings, *_doubts(before, tried)]))
        for warning in warnings:
            ctx.progress.note(f"warning: {warning}")
        rows = _table(config, before, tried, specialists)
        for row in rows:
            said = ", ".join(f"{name} {loss:.4g}" for name, loss in row["held_out_nll"].items())
            ctx.progress.note(f"{row['what']}, {row['bytes_beside_the_base']:,} bytes beside the base: {said}")
        report = _route(config, staging, out, ctx)
        write_provenance(
            staging,
            kind="moe-extract-lora",
            recipe=config.model_dump(mode="json"),
            seed=ctx.seed,
            inputs=[
                *records,
                *(data_record(f"data.{d}", s, ctx.base_dir) for d, given in config.data.items() for s in given),
            ],
            tensors={},
            checks={
                "what": _NOTE,
                "ranks": {name: t.rank for name, t in tried.items()},
                "sizes": rows,
                "route": report,
                "warnings": warnings,
            },
        )
    return out


def extract_skeleton(config: ExtractExpertsConfig, directory: Path, ctx: Context) -> None:
    """A directory that opens like the route that will be, for planners."""
    route_skeleton(_route_config(config, adapters=False), directory, ctx)


def choose_rank(losses: dict[int, float], *, tolerance: float) -> int:
    """The smallest rank whose loss is at most `1 + tolerance` times the best one's.

    By the loss, never by the share of the change's norm that a rank keeps: low ranks can be worse than no update.
    """
    best = min(losses.values())
    return min(rank for rank, loss in losses.items() if loss <= best * (1 + tolerance))


def _try_ranks(
    config: ExtractExpertsConfig, specialist: SpecialistConfig, text: Sequences, staging: Path, ctx: Context
) -> _Tried:
    """Extract an adapter of every rank, measure each on the specialist's text, and leave the chosen one in place."""
    name, model = specialist.name, specialist.model
    losses: dict[int, float] = {}
    nbytes: dict[int, int] = {}
    for rank in sorted(set(config.ranks)):
        place = staging / f".{name}-{rank}"
        extract_lora(_extract_config(config, model, rank), place, replace(ctx, overwrite=False))
        here = replace(ctx, models={**ctx.models, place.name: place})
        (losses[rank],) = _losses(open_checkpoint(f"{config.base_model}+{place.name}", here), [text], staging)
        nbytes[rank] = (place / WEIGHTS_FILE).stat().st_size
        ctx.progress.note(f"{name}: rank {rank}: {losses[rank]:.4f} nats a token on its held-out text")
    rank = choose_rank(losses, tolerance=config.tolerance)
    for other in losses:
        place = staging / f".{name}-{other}"
        if other == rank:
            place.rename(staging / name)
        else:
            shutil.rmtree(place)
    (full,) = _losses(open_checkpoint(model, ctx), [text], staging)
    return _Tried(losses, nbytes, full, rank)


def _losses(model: Checkpoint, texts: Sequence[Sequences], scratch: Path) -> list[float]:
    """Mean negative log-likelihood of every text, in float32, in nats a token."""
    with loadable(model, scratch) as path:
        loaded = load_model(path)
    found = [mean_nll(loaded, text) for text in texts]
    if not np.isfinite(found).all():
        raise ConfigError(f"{model.ref}: gives a likelihood that is NaN or infinite; the model is damaged")
    return found


def _route(config: ExtractExpertsConfig, staging: Path, out: Path, ctx: Context) -> dict[str, Any]:
    """Fit the router over base + adapter, and put its files beside the adapters; its report."""
    names = {s.name: staging / s.name for s in config.specialists}
    folder = staging / ".route"
    build_route(
        _route_config(config, adapters=True), folder, replace(ctx, models={**ctx.models, **names}, overwrite=False)
    )
    report: dict[str, Any] = json.loads((folder / "solera.json").read_text(encoding="utf-8"))["checks"]
    for file in folder.glob("route.*"):
        file.rename(staging / file.name)
    shutil.rmtree(folder)
    base_dir = os.path.relpath(ctx.base_dir.absolute(), out.absolute())
    (staging / BASE_DIR_FILE).write_text(base_dir + "\n", encoding="utf-8")
    return report


def _table(
    config: ExtractExpertsConfig, before: dict[str, float], tried: dict[str, _Tried], models: dict[str, Checkpoint]
) -> list[dict[str, Any]]:
    """Size beside the loss of every specialist on its own domain: the base, every rank, the specialists themselves."""

    def row(what: str, losses: dict[str, float], nbytes: int) -> dict[str, Any]:
        return {
            "what": what,
            "bytes_beside_the_base": nbytes,
            "held_out_nll": {name: rounded(loss) for name, loss in losses.items()},
            "mean": rounded(float(np.mean(list(losses.values())))),
        }

    whole = sum(info.nbytes for model in models.values() for info in model.tensors.values())
    return [
        row("base", before, 0),
        *(
            row(
                f"rank {rank}",
                {name: t.losses[rank] for name, t in tried.items()},
                sum(t.nbytes[rank] for t in tried.values()),
            )
            for rank in sorted(set(config.ranks))
        ),
        row(
            "chosen",
            {name: t.losses[t.rank] for name, t in tried.items()},
            sum(t.nbytes[t.rank] for t in tried.values()),
        ),
        row("specialists", {name: t.full for name, t in tried.items()}, whole),
    ]


def _doubts(before: dict[str, float], tried: dict[str, _Tried]) -> list[str]:
    found: list[str] = []
    for name, t in tried.items():
        loss = t.losses[t.rank]
        if loss >= before[name]:
            found.append(
                f"{name}: no rank tried is better on its own text than the base ({before[name]:.4f}): the best is "
                f"{min(t.losses.values()):.4f}, the specialist {t.full:.4f}; try higher ranks, or modules_to_save: auto"
            )
        elif t.full < before[name] and (before[name] - loss) < 0.9 * (before[name] - t.full):
            kept = (before[name] - loss) / (before[name] - t.full)
            found.append(
                f"{name}: rank {t.rank} keeps {kept:.0%} of what the specialist gained on its text; try higher ranks, "
                "or modules_to_save: auto"
            )
    return found


def _extract_config(config: ExtractExpertsConfig, model: str, rank: int) -> ExtractConfig:
    settings = {
        "base_model": config.base_model,
        "model": model,
        "rank": rank,
        "embeddings": config.embeddings,
        "modules_to_save": config.modules_to_save,
        "target_modules": config.target_modules,
        "dtype": config.dtype,
    }
    return parse(ExtractConfig, settings, where="moe-extract-lora")


def _route_config(config: ExtractExpertsConfig, *, adapters: bool) -> RouteConfig:
    """The router: over the adapters, or, while there are none, over the specialists themselves."""
    settings = {
        "specialists": [
            {"name": s.name, "model": f"{config.base_model}+{s.name}" if adapters else s.model}
            for s in config.specialists
        ],
        "base_model": config.base_model,
        "data": {name: [source.model_dump() for source in sources] for name, sources in config.data.items()},
        "method": config.method,
        "holdout": config.holdout,
    }
    return parse(RouteConfig, settings, where="moe-extract-lora")

"""The stages `moe-prune` and `moe-merge-experts`: a MoE in, the same with fewer experts out, its losses measured.

read_existing -> text -> layer_by_layer (usage and loss of the original) -> groups -> write -> check -> losses -> rename
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import data_path
from solera_core.errors import ConfigError
from solera_core.inspect import parameter_count
from solera_core.output import check_output, data_record, input_record, write_provenance
from solera_core.plan import Plan
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_core.threads import torch_threads
from solera_core.writer import TensorSpec, layout
from solera_merge.figures import rounded
from solera_merge.moe.calibration import Domain
from solera_merge.moe.layers import chunks_of
from solera_merge.moe.size import scores
from solera_merge.moe.size.config import MergeExpertsConfig, PruneConfig, ShrinkConfig
from solera_merge.moe.size.existing import Existing, read_existing
from solera_merge.moe.size.groups import Group, first_experts, regrouped
from solera_merge.moe.size.layerwise import layer_by_layer
from solera_merge.moe.size.text import DomainText, encode_text, read_text
from solera_merge.moe.size.usage import LayerUsage, hidden_neurons, watch_usage
from solera_merge.moe.write import write_whole

__all__ = ["build_shrunk", "neuron_features", "plan_shrunk", "shrunk_skeleton"]

_KINDS: Final = {PruneConfig: "moe-prune", MergeExpertsConfig: "moe-merge-experts"}
_SCORES: Final = {"reap": scores.reap, "contribution": scores.contribution, "frequency": scores.frequency}
_HARMED: Final = 0.05
"""A rise of a domain's loss, as a share, from which a warning names it; where it is also twice the mean rise."""

Grouping = Mapping[int, list[Sequence[Group]]]
"""By number of experts: the groups of every sparse layer."""


def plan_shrunk(config: ShrinkConfig, ctx: Context) -> Plan:
    """What would be read, run and written; from headers and the text files, without weights.

    Raises:
        SoleraError: everything that is wrong with model and texts and that headers and text files can tell.
    """
    model, domains, warnings = _open(config, ctx)
    return _plan(config, model, domains, warnings)


def build_shrunk(config: ShrinkConfig, out: Path, ctx: Context) -> Path:
    """Write the MoE with fewer experts into `out`, which appears only when it is whole, loads and is measured.

    Raises:
        SoleraError: a dense model, too many experts asked for, too little text, a target in the way, no room.
    """
    check_target(out, overwrite=ctx.overwrite)
    model, domains, warnings = _open(config, ctx)
    sources = [source for given in config.data.values() for source in given]
    texts = [path for source in sources if (path := data_path(source, ctx.base_dir)) is not None]
    check_apart(out, model.checkpoint.directories, texts)
    plan = _plan(config, model, domains, warnings)
    require_disk(out, plan.disk_bytes)
    text = encode_text(domains, model.checkpoint, config)
    for warning in (*warnings, *text.warnings):
        ctx.progress.note(f"warning: {warning}")
    record = input_record(model.checkpoint, "model", attest=ctx.attest)
    with torch_threads(ctx.threads), staged(out, overwrite=ctx.overwrite, flush=ctx.flush) as staging:
        before, grouping, layers = _examine(config, model, text, staging / ".layers", ctx)
        small = regrouped(model, grouping[config.keep])
        digests = write_whole(staging, small, threads=ctx.threads, progress=ctx.progress)
        checks = check_output(staging, trust_remote_code=ctx.trust_remote_code)
        rows = [_row(model.experts, model.checkpoint, text, before)]
        for keep in sorted({config.keep, *config.sizes}, reverse=True):
            measured = open_checkpoint(staging, Context()) if keep == config.keep else regrouped(model, grouping[keep])
            losses = layer_by_layer(
                measured,
                scored=text.held_out,
                scratch=staging / ".layers",
                progress=ctx.progress,
                what=f"held-out text, {keep} experts",
            )
            rows.append(_row(keep, measured, text, losses))
        for row in rows:
            said = ", ".join(f"{name} {loss:.4g}" for name, loss in row["held_out_nll"].items())
            size = f"{row['experts']} experts, {row['parameters']:,} parameters"
            ctx.progress.note(f"{size}: {row['mean']:.4g} nats a token on held-out text ({said})")
        found = [*warnings, *text.warnings, *_harm(rows, config.keep)]
        for warning in found[len(warnings) + len(text.warnings) :]:
            ctx.progress.note(f"warning: {warning}")
        write_provenance(
            staging,
            kind=_KINDS[type(config)],
            recipe=config.model_dump(mode="json"),
            seed=ctx.seed,
            inputs=[record, *(data_record(f"data.{d}", s, ctx.base_dir) for d in config.data for s in config.data[d])],
            tensors=digests,
            checks=checks | {"sizes": rows, "layers_shrunk": layers, "warnings": found},
        )
        model.checkpoint.require_unchanged()
    return out


def shrunk_skeleton(config: ShrinkConfig, ctx: Context) -> tuple[dict[str, Any], list[TensorSpec], list[Path]]:
    """Config, tensors and sidecars of what will be written, for planners.

    Raises:
        SoleraError: as `plan_shrunk`, but for the texts.
    """
    small = regrouped(model := _open_model(config, ctx), first_experts(model, config.keep))
    return small.config, _specs(small), list(small.sidecars)


def _open(config: ShrinkConfig, ctx: Context) -> tuple[Existing, list[Domain], list[str]]:
    model = _open_model(config, ctx)
    domains, warnings = read_text(config, ctx)
    positions = model.checkpoint.config.get("max_position_embeddings")
    if positions is not None and config.sequence_tokens > positions:
        warnings.append(
            f"sequence_tokens: {config.sequence_tokens} is more than the model's max_position_embeddings; sequences of "
            f"{positions} are used"
        )
    return model, domains, warnings


def _open_model(config: ShrinkConfig, ctx: Context) -> Existing:
    model = read_existing(open_checkpoint(config.model, ctx))
    for key, keep in (("keep", config.keep), *(("sizes", size) for size in config.sizes)):
        if keep >= model.experts:
            raise ConfigError(
                f"{key}: {keep} experts shall be left, but {config.model} has {model.experts}; nothing would be smaller"
            )
        if keep < model.top_k:
            raise ConfigError(
                f"{key}: {keep} experts shall be left, but {model.top_k} work on a token (num_experts_per_tok of "
                f"{config.model}); keep at least {model.top_k}"
            )
    return model


def _specs(model: Checkpoint) -> list[TensorSpec]:
    return [TensorSpec(name, info.dtype, info.shape) for name, info in model.tensors.items()]


def _plan(config: ShrinkConfig, model: Existing, domains: Sequence[Domain], warnings: Sequence[str]) -> Plan:
    checkpoint = model.checkpoint
    small = regrouped(model, first_experts(model, config.keep))
    specs = _specs(small)
    nbytes = sum(spec.nbytes for spec in specs)
    sizes: dict[int, int] = {}
    outside = 0
    for name, info in checkpoint.tensors.items():
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            sizes[layer] = sizes.get(layer, 0) + info.size
        else:
            outside += info.size
    largest = max(sizes.values())
    width = checkpoint.tensors[model.layers[0].router].shape[1]
    inner = checkpoint.tensors[model.layers[0].experts["down"][0]].shape[-1]
    # Matching neurons: the weights of two experts, the likeness of all pairs, and what the assignment makes of it.
    matching = 24 * inner * width + 20 * inner**2 if getattr(config, "align", "none") != "none" else 0
    tokens = len(domains) * config.tokens_per_domain * (1 + config.holdout / (1 - config.holdout))
    before, after = parameter_count(checkpoint), parameter_count(small)
    return Plan(
        stage=_KINDS[type(config)],
        reads=[
            {
                "what": "model",
                "path": str(checkpoint.path),
                "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
                "ref": checkpoint.ref,
            },
            *(
                {
                    "what": f"text of {domain.name!r}",
                    "path": ", ".join(source.path for source in config.data[domain.name]),
                    "bytes": sum(document.n_bytes for document in (*domain.fit, *domain.held_out)),
                    "documents": len(domain.fit),
                    "documents_held_out": len(domain.held_out),
                }
                for domain in domains
            ),
        ],
        writes=[{"what": shard.file, "bytes": shard.nbytes} for shard in layout(specs)],
        # A layer in float32, and what its loading takes.
        memory_bytes=4 * (2 * largest + outside) + matching + (1 << 28),
        disk_bytes=nbytes + 4 * (largest + outside) + int(tokens) * width * 4,
        parameters={
            **config.model_dump(mode="json"),
            "experts": model.experts,
            "top_k": model.top_k,
            "parameters_total": after.total,
            "parameters_active": after.active,
            "parameters_before": before.total,
        },
        rows=[
            {"layer": layer.index, "experts": model.experts, "left": config.keep, "fused": layer.fused}
            for layer in model.layers
        ],
        warnings=list(warnings),
    )


def _examine(
    config: ShrinkConfig, model: Existing, text: DomainText, scratch: Path, ctx: Context
) -> tuple[list[float], Grouping, dict[str, Any]]:
    """Held-out losses of the original, the groups by number of experts, and what every layer's decision rests on."""
    sizes = sorted({config.keep, *config.sizes})
    grouping: dict[int, list[Sequence[Group]]] = {keep: [] for keep in sizes}
    facts: dict[str, Any] = {}

    def decide(layer: int, usage: LayerUsage, experts: Any) -> None:
        for keep in sizes:
            grouping[keep].append(_groups(config, keep, usage, experts))
        facts[str(layer)] = {
            "experts": [list(group.members) for group in grouping[config.keep][-1]],
            "reap": [rounded(float(score)) for score in scores.reap(usage)],
            "share_of_tokens": [rounded(float(share)) for share in scores.frequency(usage)],
        }

    needs_outputs = isinstance(config, MergeExpertsConfig)
    before = layer_by_layer(
        model.checkpoint,
        scored=text.held_out,
        watched=text.seen,
        watch=watch_usage(decide, batches=len(chunks_of(text.seen)), outputs=needs_outputs),
        scratch=scratch,
        progress=ctx.progress,
        what="what the experts do",
    )
    return before, grouping, facts


def _groups(config: ShrinkConfig, keep: int, usage: LayerUsage, experts: Any) -> list[Group]:
    """The experts of one layer that are left, in the order of their router rows in the original."""
    if isinstance(config, PruneConfig):
        return [Group((e,)) for e in scores.most_salient(_SCORES[config.score](usage), keep)]
    assert isinstance(config, MergeExpertsConfig)
    score_E = _SCORES[config.score or ("reap" if config.group == "ream" else "frequency")](usage)
    match config.group:
        case "ream":
            similar_EE = scores.similarity(usage, outputs=True)
            members = scores.greedy_groups(score_E, similar_EE, keep, size=config.group_size)
        case "m_smoe":
            members = scores.closest_groups(score_E, scores.similarity(usage, outputs=False), keep)
        case _:
            members = scores.linked_groups(score_E, usage.outputs / usage.sampled, keep)
    # A leader's are used again and again, a member's once: two at a time are in memory.
    features = lru_cache(maxsize=2)(lambda e: neuron_features(config.align, e, usage, experts))

    def order(leader: int, member: int) -> tuple[int, ...] | None:
        return None if config.align == "none" else scores.match_neurons(features(leader), features(member))

    return [scores.average(group, usage.counts, order) for group in members]


def neuron_features(align: str, e: int, usage: LayerUsage, experts: Any) -> np.ndarray:
    """What the neurons of an expert are matched by, (F, X): their three weight vectors, or their activations."""
    import torch

    with torch.inference_mode():
        if align == "activations":
            found = hidden_neurons(experts, e, torch.cat(usage.sample)).T
        else:
            gate_FD, up_FD = experts.gate_up_proj[e].chunk(2)
            # Each of the three as long as the others on average: a scale moves freely between up and down.
            parts = [gate_FD, up_FD, experts.down_proj[e].T]
            found = torch.cat([part / part.norm().clamp(min=1e-30) for part in parts], dim=1)
        features: np.ndarray = found.float().numpy()
    return features


def _row(experts: int, model: Checkpoint, text: DomainText, losses: Sequence[float]) -> dict[str, Any]:
    """Size and held-out loss in nats a token: of the original first, then of every smaller one."""
    count = parameter_count(model)
    return {
        "experts": experts,
        "parameters": count.total,
        "parameters_active": count.active,
        "bytes": sum(math.prod(info.shape) * (info.nbytes // max(info.size, 1)) for info in model.tensors.values()),
        "held_out_nll": {name: rounded(loss) for name, loss in zip(text.names, losses, strict=True)},
        "mean": rounded(float(np.mean(losses))),
    }


def _harm(rows: Sequence[Mapping[str, Any]], keep: int) -> list[str]:
    """Domains that pay for the size of all."""
    before, after = rows[0], next(row for row in rows[1:] if row["experts"] == keep)
    rise = {name: after["held_out_nll"][name] / loss - 1 for name, loss in before["held_out_nll"].items()}
    mean = float(np.mean(list(rise.values())))
    return [
        f"held-out loss of {name!r} rises by {value:.0%} (all domains: {mean:.0%}): what it needs went with the experts"
        for name, value in rise.items()
        if value > _HARMED and value > 2 * mean
    ]

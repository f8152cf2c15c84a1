"""Making the trunk: the base's, an expert's, that of a merge, or the best of several on held-out text.

On real text with full fine-tunes the trunk mattered more than the router: with every text sent to its own expert, the
base's trunk stood at 3.47 nats a token where a task arithmetic of the experts stood at 2.55. So it is measured. A trunk
is judged by the blend that routes perfectly: text of domain e through the trunk with expert e's feed-forward networks.
That takes one dense model in memory, needs no router, and no router can do much better.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError
from solera_core.provenance import read_provenance
from solera_merge.config import MergeConfig
from solera_merge.figures import rounded
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.dense import Dense, read_dense
from solera_merge.moe.inputs import Inputs, open_inputs
from solera_merge.moe.trunk_config import TrunkMerge, candidates
from solera_merge.moe.vocabulary import compare_tokenizers

if TYPE_CHECKING:
    from solera_core.plan import Plan

__all__ = ["PlannedTrunk", "best_dense", "make_trunk", "plan_trunk"]


@dataclass(frozen=True)
class PlannedTrunk:
    """What making the trunk needs.

    Attributes:
        merges: the plan of every merge, by the name of the candidate.
        memory_bytes: of the largest merge, or of the dense model that judges the candidates.
        disk_bytes: of merged trunks that exist at the same time, in the staging directory.
        models: that are merged and are neither the base nor an expert.
        warnings: of the merges.
    """

    merges: Mapping[str, "Plan"]
    memory_bytes: int
    disk_bytes: int
    models: tuple[Checkpoint, ...]
    warnings: tuple[str, ...]


def _candidates(config: MoeConfig) -> dict[str, MergeConfig | None]:
    return candidates(config.trunk, config.base_model, [expert.model for expert in config.experts])


def plan_trunk(config: MoeConfig, inputs: Inputs, ctx: Context) -> PlannedTrunk:
    """Plan every merge and check, from headers alone, that its result has the shape of the base.

    Raises:
        SoleraError: what is wrong with the recipe of a merge and its models.
        CheckpointError: the merge would have other tensors or shapes than the base.
    """
    from solera_merge.plan import describe, make_plan

    plans: dict[str, Plan] = {}
    warnings: dict[str, None] = {}
    others: dict[str, Checkpoint] = {}
    known = {model.stored.ref for model in (inputs.base, *inputs.experts)}
    expected = {name: info.shape for name, info in inputs.base.stored.tensors.items()}
    for name, recipe in _candidates(config).items():
        if recipe is None:
            continue
        try:
            plan, models = make_plan(recipe, ctx)
        except (ConfigError, CheckpointError) as e:
            raise type(e)("\n".join(f"trunk: {line}" for line in str(e).splitlines())) from e
        found = {tensor.name: tensor.shape for tensor in plan.tensors}
        for tensor in sorted(expected.keys() | found.keys()):
            if expected.get(tensor) != found.get(tensor):
                raise CheckpointError(
                    f"trunk: {tensor}: {_shape(found.get(tensor))} in the merge, but {_shape(expected.get(tensor))} in "
                    f"{inputs.base.stored.ref}; a trunk has the layers and the vocabulary of the base"
                )
        plans[name] = describe(plan, recipe, models, ctx)
        warnings |= dict.fromkeys(f"trunk: {warning}" for warning in plans[name].warnings)
        others |= {model.ref: model for model in models.inputs if model.ref not in known}  # (adapters share a path)
    sizes = [plan.disk_bytes for plan in plans.values()]
    judged = 4 * sum(info.size for info in inputs.base.stored.tensors.values()) if config.trunk == "auto" else 0
    return PlannedTrunk(
        merges=plans,
        memory_bytes=max([judged, *(plan.memory_bytes for plan in plans.values())]),
        disk_bytes=sum(sorted(sizes)[-2:]),  # the best one, and the one that is looked at
        models=tuple(others.values()),
        warnings=tuple(warnings),
    )


def make_trunk(
    config: MoeConfig, inputs: Inputs, held_out: Sequence[Sequences], scratch: Path, ctx: Context
) -> tuple[Inputs, dict[str, Any]]:
    """Make the candidates, one after the other, and take the best.

    Args:
        config: the settings.
        inputs: the base and the experts.
        held_out: text of every expert's domain, in their order; looked at where several candidates are compared.
        scratch: an empty directory, which must stay as long as the trunk is used.
        ctx: threads and memory of the merges.

    Returns:
        The inputs with their trunk, and the facts for solera.json: the recipe, and the mean loss of every candidate
        under perfect routing, in nats a token, by domain too.
    """
    made = _candidates(config)
    best, lowest = "", np.inf
    trunks: dict[str, Dense] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, recipe in made.items():
        trunk = _one(name, recipe, inputs, scratch / name.replace(" ", "_"), ctx)
        trunks[name] = trunk
        if len(made) > 1:
            losses = _oracle_nll(replace(inputs, trunk=trunk), held_out, scratch / "judged", ctx)
            mean = float(np.mean(losses))
            domains = {domain: rounded(loss) for domain, loss in zip(inputs.names, losses, strict=True)}
            table[name] = {"mean": rounded(mean), "domains": domains}
            ctx.progress.note(f"trunk {name}: {mean:.4f} nats a token with every text sent to its expert")
        else:
            mean = 0.0
        worse = name if best and not mean < lowest else best
        if worse:
            shutil.rmtree(scratch / worse.replace(" ", "_"), ignore_errors=True)
        if worse != name:
            best, lowest = name, mean
    facts: dict[str, Any] = {"chosen": best}
    if table:
        facts["oracle_routed_nll"] = table
    if made[best] is not None:
        record = read_provenance(trunks[best].stored.path)
        facts["merge"] = {"recipe": record["recipe"], "inputs": record["inputs"]}
    return replace(inputs, trunk=trunks[best]), facts


def best_dense(config: MoeConfig, scratch: Path, ctx: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """The merge of the experts that is the best dense model on the held-out text.

    Args:
        config: of the MoE; has text of every domain.
        scratch: a directory for the merges, made and removed here.
        ctx: threads and memory of the merges.

    Returns:
        Its recipe, and for solera.json which it is and the mean loss of every merge in nats a token.
    """
    from solera_core.causal_lm import load_model
    from solera_merge.moe.calibration import read_domains
    from solera_merge.moe.fit import encode_domains
    from solera_merge.moe.routing import mean_nll

    inputs, router = open_inputs(config, ctx), config.router
    domains, _ = read_domains(router.data, base_dir=ctx.base_dir, holdout=router.holdout, seed=ctx.seed)
    held_out = encode_domains(domains, None, inputs, router).held_out
    recipes = candidates("auto", config.base_model, [expert.model for expert in config.experts])
    if isinstance(config.trunk, TrunkMerge):
        recipes["merge"] = config.trunk.merge
    losses: dict[str, float] = {}
    scratch.mkdir(exist_ok=True)
    for name, recipe in recipes.items():
        if recipe is None:
            continue
        trunk = _one(name, recipe, inputs, scratch / name.replace(" ", "_"), ctx)
        model = load_model(trunk.stored.path)
        losses[name] = float(np.mean([mean_nll(model, text) for text in held_out]))
        ctx.progress.note(f"{name} as a dense model: {losses[name]:.4f} nats a token")
        shutil.rmtree(trunk.stored.path)
    shutil.rmtree(scratch)
    best = min(losses, key=losses.__getitem__)
    chosen = recipes[best]
    assert chosen is not None
    return chosen.model_dump(mode="json", exclude_none=True), {
        "chosen": best,
        "nll": {name: rounded(loss) for name, loss in losses.items()},
    }


def _one(name: str, recipe: MergeConfig | None, inputs: Inputs, place: Path, ctx: Context) -> Dense:
    if recipe is None:
        return inputs.base if name == "base" else inputs.experts[inputs.names.index(name)]
    from solera_merge.run import merge

    merge(recipe, place, replace(ctx, reload_check=False, flush=False))
    trunk = read_dense("trunk", open_checkpoint(str(place.resolve()), Context()))
    for field, value in inputs.base.fields.items():
        if trunk.fields[field] != value:
            raise ConfigError(
                f"trunk: the merge has {field}: {trunk.fields[field]!r}, but {inputs.base.stored.ref} has {value!r}; "
                "give it `base_model: base`, whose config it then gets"
            )
    # The MoE has the base's tokenizer: a merge that brought the rows of its embedding into another order is no trunk.
    try:
        compare_tokenizers(inputs.base.checkpoint, trunk.checkpoint, "trunk")
    except CheckpointError as e:
        raise CheckpointError(
            f"trunk: the MoE gets the tokenizer of {inputs.base.stored.ref}, and the merge has another one; "
            f"leave its `tokenizer` out, or give it `base_model: base`: {e}"
        ) from e
    return trunk


def _oracle_nll(inputs: Inputs, held_out: Sequence[Sequences], scratch: Path, ctx: Context) -> list[float]:
    from solera_merge.moe.fit import load_trunk
    from solera_merge.moe.routing import mean_nll
    from solera_merge.moe.states import put_ffn

    model = load_trunk(inputs, scratch, ctx)
    losses: list[float] = []
    for expert, text in zip(inputs.experts, held_out, strict=True):
        put_ffn(model, expert)
        losses.append(mean_nll(model, text))
    return losses


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"shape {shape}"

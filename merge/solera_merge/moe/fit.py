"""Making the routers of a MoE: calibrate, solve, choose the temperature on held-out text, and say how well it went."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solera_core.causal_lm import load_model, load_tokenizer
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import DataError
from solera_merge.figures import rounded
from solera_merge.moe.calibration import Domain, Sequences, tokenize
from solera_merge.moe.config import MoeConfig, RouterConfig
from solera_merge.moe.inputs import Inputs
from solera_merge.moe.router import REFINEMENTS, SCALES, random_router, ridge_router, search_scale, uniform_router
from solera_merge.moe.routing import first_choices, forced_route, mean_nll, set_routers
from solera_merge.moe.states import router_statistics
from solera_merge.moe.write import replace_routers, write_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Calibration",
    "encode_domains",
    "fit_routers",
    "load_trunk",
    "needs_trunk_copy",
    "random_routers",
    "tune_routers",
]

_SOUND_TOKENS = 1000
"""Held-out tokens below which a domain's likelihood says little; a note warns."""


@dataclass(frozen=True)
class Calibration:
    """Calibration text as tokens, by expert, in the order of the experts.

    Attributes:
        fit: what the statistics are summed over.
        held_out: what the temperature and the facts in solera.json rest on.
        warnings: of domains that have less than was asked for.
    """

    fit: tuple[Sequences, ...]
    held_out: tuple[Sequences, ...]
    warnings: tuple[str, ...]


def encode_domains(domains: Sequence[Domain], inputs: Inputs, config: RouterConfig) -> Calibration:
    """Tokenize every domain with the trunk's tokenizer, and refuse what is too little.

    Raises:
        DataError: a domain has fewer tokens to fit on than the router has inputs, or none held out to score.
        CheckpointError: the trunk has no tokenizer.
    """
    width = int(inputs.trunk.fields["hidden_size"])
    tokenizer = load_tokenizer(inputs.trunk.checkpoint.path)
    length = min(config.sequence_tokens, int(inputs.trunk.fields["max_position_embeddings"]))
    tokenizer.model_max_length = 1 << 30  # long documents are cut into sequences here; its warning would mislead
    by_name = {domain.name: domain for domain in domains}
    held_out_tokens = max(round(config.tokens_per_domain * config.holdout / (1 - config.holdout)), 2)
    fit: list[Sequences] = []
    held_out: list[Sequences] = []
    warnings: list[str] = []
    for name in inputs.names:
        where = f"router.data.{name}"
        parts = [
            tokenize(documents, tokenizer, limit=limit, sequence_tokens=length, where=where)
            for documents, limit in (
                (by_name[name].fit, config.tokens_per_domain),
                (by_name[name].held_out, held_out_tokens),
            )
        ]
        if parts[0].tokens < width:
            raise DataError(
                f"{where}: {parts[0].tokens} tokens to fit on (and {parts[1].tokens} held out) are too little: at "
                f"least {width} are needed, the width of the model, and {config.tokens_per_domain} are asked for "
                "(router.tokens_per_domain); add text"
            )
        if parts[1].scored == 0:
            raise DataError(f"{where}: the held-out text has no token to score; add documents")
        vocabulary = inputs.trunk.fields["vocab_size"]
        if (largest := max(max(ids) for part in parts for ids in part.ids)) >= vocabulary:
            raise DataError(f"{where}: the tokenizer gives id {largest}, but the model has {vocabulary} embeddings")
        if parts[0].tokens < config.tokens_per_domain:
            warnings.append(f"{where}: {parts[0].tokens} tokens to fit on, {config.tokens_per_domain} were asked for")
        if parts[1].scored < _SOUND_TOKENS:
            warnings.append(f"{where}: only {parts[1].scored} held-out tokens are scored, so its figures are rough")
        fit.append(parts[0])
        held_out.append(parts[1])
    return Calibration(tuple(fit), tuple(held_out), tuple(warnings))


def random_routers(config: MoeConfig, inputs: Inputs, *, seed: int) -> list[np.ndarray]:
    """One random matrix a layer, over the temperature where a number is given.

    As Mixtral initialises its own, or as mergekit draws them (N(0, 1); or evenly from +-1 / sqrt(D)).
    """
    temperature = 1.0 if config.router.temperature == "auto" else config.router.temperature
    shape = (len(inputs.experts), int(inputs.trunk.fields["hidden_size"]))
    names = [inputs.target.router.format(layer=layer) for layer in range(inputs.trunk.layers)]
    if config.router.fit == "mergekit_uniform_random":
        return [uniform_router(name, shape, bound=shape[1] ** -0.5 / temperature, seed=seed) for name in names]
    std = 1.0 if config.router.fit == "mergekit_random" else float(inputs.trunk.fields["initializer_range"])
    return [random_router(name, shape, std=std / temperature, seed=seed) for name in names]


def needs_trunk_copy(inputs: Inputs) -> bool:
    """Whether the dense model for the statistics must be written out: the trunk as it lies on disk does not do."""
    checkpoint = inputs.trunk.stored
    return any(checkpoint.is_derived(name) for name in checkpoint.tensors) or any(
        info.file.suffix != ".safetensors" for info in checkpoint.tensors.values()
    )


def load_trunk(inputs: Inputs, scratch: Path, ctx: Context, *, dtype: str = "float32") -> "PreTrainedModel":
    """The dense trunk, run by transformers; `scratch` is made and removed where it must be written out for that."""
    path = inputs.trunk.checkpoint.path
    if needs_trunk_copy(inputs):
        path = scratch
        path.mkdir()
        write_dense(path, inputs.trunk, inputs.trunk, like=inputs.trunk, dtype=None, threads=ctx.threads)
    model = load_model(path, dtype=dtype)
    shutil.rmtree(scratch, ignore_errors=True)
    return model


def fit_routers(
    config: MoeConfig, inputs: Inputs, calibration: Calibration, scratch: Path, ctx: Context
) -> list[np.ndarray]:
    """The ridge fit of every layer's router, (E, D) float64, at temperature 1.

    One dense float32 model is in memory, and one D x D float64 matrix a layer.
    """
    model = load_trunk(inputs, scratch, ctx)
    statistics = router_statistics(model, inputs.experts, calibration.fit, progress=ctx.progress)
    return [ridge_router(layer.gram, layer.sums, layer.counts, ridge=config.router.ridge) for layer in statistics]


def tune_routers(
    directory: Path,
    routers: Sequence[np.ndarray],
    config: MoeConfig,
    inputs: Inputs,
    calibration: Calibration,
    ctx: Context,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Choose the temperature of the routers of a written MoE, put it there, and measure on the held-out text.

    Every scale is judged by the MoE itself, loaded whole: the mean over domains of the negative log-likelihood. With
    one expert a token the scale has no effect (its weight is always 1) and none is searched.

    Returns:
        The new digests of the routers, and the facts for solera.json.
    """
    model = load_model(directory)
    names, held_out = inputs.names, calibration.held_out
    asked = config.router.temperature
    search = asked == "auto" and config.top_k > 1

    trials = len(SCALES) + 2 * REFINEMENTS if search else 2
    with ctx.progress.task("choosing the temperature", trials, "trials") as task:

        def loss(scale: float) -> float:
            set_routers(model, [scale * router for router in routers])
            value = float(np.mean([mean_nll(model, text) for text in held_out]))
            task.advance(1, f"temperature {1 / scale:.3g}: {value:.4f}")
            return value

        untuned = loss(1.0)
        if search:
            scale, tried = search_scale(lambda s: untuned if s == 1.0 else loss(s))
        else:
            scale = 1.0 if asked == "auto" else 1 / asked
            tried = {1.0: untuned} | ({scale: loss(scale)} if scale != 1.0 else {})
    digests = replace_routers(open_checkpoint(directory, Context()), [scale * router for router in routers])
    written = open_checkpoint(directory, Context())  # anew: an open checkpoint refuses files that have changed
    # Measured with the routers as they are on disk, rounded to their number format.
    set_routers(model, [written.read(inputs.target.router.format(layer=layer)) for layer in range(len(routers))])
    share: dict[str, list[float]] = {}
    tuned: dict[str, float] = {}
    oracle: dict[str, float] = {}
    for e, (name, text) in enumerate(zip(names, held_out, strict=True)):
        with first_choices(model, len(names)) as counts_LE:
            tuned[name] = mean_nll(model, text)
        share[name] = [rounded(value) for value in counts_LE[:, e] / counts_LE.sum(axis=1)]
        with forced_route(model, e):
            oracle[name] = mean_nll(model, text)
    return digests, {
        "fit": "ridge",
        "temperature": rounded(1 / scale),
        "tried": {f"{1 / s:.4g}": rounded(value) for s, value in sorted(tried.items(), reverse=True)},
        "tokens_fit": {name: text.tokens for name, text in zip(names, calibration.fit, strict=True)},
        "tokens_held_out": {name: text.scored for name, text in zip(names, held_out, strict=True)},
        "route_accuracy": share,
        "held_out_nll": {
            "at_temperature_1": rounded(untuned),
            "mean": rounded(float(np.mean(list(tuned.values())))),
            "domains": {name: rounded(value) for name, value in tuned.items()},
            "oracle_routed": {name: rounded(value) for name, value in oracle.items()},
        },
    }

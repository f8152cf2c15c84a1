"""Making the routers of a MoE out of text: tokens first, then, layer by layer, sums and rows."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solera_core.causal_lm import load_model, load_tokenizer
from solera_core.context import Context
from solera_core.errors import DataError
from solera_merge.moe.calibration import Domain, Sequences, tokenize
from solera_merge.moe.config import AUTO, MoeConfig, RouterConfig
from solera_merge.moe.inputs import Inputs
from solera_merge.moe.lda import lda_router
from solera_merge.moe.logistic import logistic_router
from solera_merge.moe.router import random_router, ridge_router, uniform_router
from solera_merge.moe.states import LayerInputs, RouterStatistics, Taught, taught_states
from solera_merge.moe.statistics_file import StatisticsWriter
from solera_merge.moe.unlabelled import label_by_specialists
from solera_merge.moe.write import write_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "TEXT_FITS",
    "Calibration",
    "about",
    "encode_domains",
    "fit_routers",
    "fits_asked",
    "load_trunk",
    "needs_trunk_copy",
    "random_routers",
]

TEXT_FITS = (*AUTO, "auto")
"""Fits that are made of text."""

_SOUND_TOKENS = 1000
"""Held-out tokens below which a domain's likelihood says little; a note warns."""


@dataclass(frozen=True)
class Calibration:
    """Calibration text as tokens, by expert, in the order of the experts.

    Attributes:
        experts: index of the expert of each domain (all of them, but where a MoE is extended).
        fit: of each domain, what the sums are made of (empty: of an expert whose sums are known).
        held_out: of each domain, what the temperature and the facts in solera.json rest on.
        unlabelled: text of no known domain: to fit on, and held out.
        warnings: of domains that have less than was asked for.
    """

    experts: tuple[int, ...]
    fit: tuple[Sequences, ...]
    held_out: tuple[Sequences, ...]
    unlabelled: tuple[Sequences, Sequences] | None
    warnings: tuple[str, ...]


def encode_domains(
    domains: Sequence[Domain], unlabelled: Domain | None, inputs: Inputs, config: RouterConfig
) -> Calibration:
    """Tokenize every domain with the trunk's tokenizer, and refuse what is too little.

    Raises:
        DataError: a domain has fewer tokens to fit on than the router has inputs, or none held out to score.
        CheckpointError: the trunk has no tokenizer.
    """
    tokenizer = load_tokenizer(inputs.trunk.checkpoint.path)
    length = min(config.sequence_tokens, int(inputs.trunk.fields["max_position_embeddings"]))
    tokenizer.model_max_length = 1 << 30  # long documents are cut into sequences here; its warning would mislead
    warnings: list[str] = []
    fits = config.fit in TEXT_FITS

    def parts(domain: Domain, where: str, *, times: int, fits: bool, apart: bool) -> tuple[Sequences, Sequences]:
        limit = config.tokens_per_domain * times
        fit, held_out = (
            tokenize(documents, tokenizer, limit=most, sequence_tokens=length, where=where, apart=apart)
            for documents, most in ((domain.fit, limit), (domain.held_out, config.held_out_tokens * times))
        )
        _check_amount(fit, held_out, limit, inputs, where, fits=fits, warnings=warnings)
        return fit, held_out

    found = {
        inputs.names.index(domain.name): parts(
            domain,
            f"router.data.{domain.name}",
            times=1,
            fits=fits and config.fit != "nll" and not inputs.is_old(domain.name),
            apart=False,
        )
        for domain in domains
    }
    experts = tuple(sorted(found))
    mixed = None
    if unlabelled is not None:
        mixed = parts(unlabelled, "router.unlabelled", times=len(inputs.names), fits=True, apart=True)
    return Calibration(
        experts,
        tuple(found[e][0] for e in experts),
        tuple(found[e][1] for e in experts),
        mixed,
        tuple(warnings),
    )


def _check_amount(
    fit: Sequences, held_out: Sequences, asked: int, inputs: Inputs, where: str, *, fits: bool, warnings: list[str]
) -> None:
    width = int(inputs.trunk.fields["hidden_size"])
    if fits and fit.tokens < width:
        raise DataError(
            f"{where}: {fit.tokens} tokens to fit on (and {held_out.tokens} held out) are too little: at "
            f"least {width} are needed, the width of the model, and {asked} are asked for "
            "(router.tokens_per_domain); add text"
        )
    if held_out.scored == 0:
        raise DataError(f"{where}: the held-out text has no token to score; add documents")
    vocabulary = inputs.trunk.fields["vocab_size"]
    if (largest := max(max(ids) for part in (fit, held_out) for ids in part.ids)) >= vocabulary:
        raise DataError(f"{where}: the tokenizer gives id {largest}, but the model has {vocabulary} embeddings")
    if fits and fit.tokens < asked:
        warnings.append(f"{where}: {fit.tokens} tokens to fit on, {asked} were asked for")
    if held_out.scored < _SOUND_TOKENS:
        warnings.append(f"{where}: only {held_out.scored} held-out tokens are scored, so its figures are rough")


def fits_asked(config: MoeConfig) -> tuple[str, ...]:
    """The fits to text that are made: the one asked for, or those that `auto` compares."""
    if config.router.fit != "auto":
        return (config.router.fit,)
    absent = {"nll"} if not config.router.unlabelled else set[str]()
    return tuple(fit for fit in AUTO if fit not in absent | ({"logistic"} if config.extend else set[str]()))


def random_routers(config: MoeConfig, inputs: Inputs, *, seed: int) -> list[np.ndarray]:
    """One random matrix a layer.

    As Mixtral initialises its own, or as mergekit draws them (N(0, 1); or, as a linear layer has it, evenly from
    +-1 / sqrt(D)); zeros under `none`.
    """
    shape = (len(inputs.experts), int(inputs.trunk.fields["hidden_size"]))
    names = [inputs.target.router.format(layer=layer) for layer in range(inputs.trunk.layers)]
    if config.router.fit == "none":
        return [np.zeros(shape, dtype=np.float32) for _ in names]
    if config.router.fit in ("uniform", "mergekit_uniform_random"):
        return [uniform_router(name, shape, bound=shape[1] ** -0.5, seed=seed) for name in names]
    std = 1.0 if config.router.fit == "mergekit_random" else float(inputs.trunk.fields["initializer_range"])
    return [random_router(name, shape, std=std, seed=seed) for name in names]


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
    config: MoeConfig,
    inputs: Inputs,
    calibration: Calibration,
    directory: Path,
    scratch: Path,
    ctx: Context,
    *,
    weights: str,
) -> dict[str, list[np.ndarray]]:
    """The routers of every fit that is asked for, each one (E, D) float64 a layer, at temperature 1.

    One layer of a dense float32 model and one D x D float64 matrix are in memory, the states in files. The sums of the
    experts' text are written beside the MoE in `directory`.

    Args:
        config: with a fit to text.
        inputs: opened.
        calibration: their text.
        directory: of the MoE.
        scratch: a directory for states.
        ctx: threads, progress.
        weights: digest of the MoE's weights but its routers, by which its sums are known to be its own.
    """
    asked = fits_asked(config)
    found: dict[str, list[np.ndarray]] = {fit: [] for fit in asked}
    of_domains = [fit for fit in asked if fit != "nll"]
    options: dict[str, Any] = {"scratch": scratch, "threads": ctx.threads, "progress": ctx.progress}
    if of_domains:
        texts = [
            Taught(e, f"router.data.{inputs.names[e]}", text)
            for e, text in zip(calibration.experts, calibration.fit, strict=True)
            if not inputs.is_old(inputs.names[e])
        ]
        with ExitStack() as stack:
            writer = stack.enter_context(_writer(directory, inputs, weights))
            for layer in taught_states(inputs.trunk, inputs.experts, texts, keep="logistic" in asked, **options):
                sums = layer.statistics
                if inputs.old is not None:
                    sums = inputs.old.statistics.read(layer.layer, experts=len(inputs.names)) + sums
                writer.write(sums)
                for fit in of_domains:
                    found[fit].append(_rows(fit, sums, layer, config.router))
    if "nll" in asked:
        assert calibration.unlabelled is not None
        texts = label_by_specialists(
            inputs.experts, calibration.unlabelled[0], where="router.unlabelled", scratch=scratch, ctx=ctx
        )
        for layer in taught_states(inputs.trunk, inputs.experts, texts, keep=False, **options):
            found["nll"].append(_rows("ridge", layer.statistics, layer, config.router))
    return found


def _rows(fit: str, sums: RouterStatistics, layer: LayerInputs, config: RouterConfig) -> np.ndarray:
    of_sums = (sums.gram, sums.sums, sums.counts)
    match fit:
        case "lda":
            return lda_router(*of_sums, shrinkage=config.shrinkage)
        case "centroid":
            return lda_router(*of_sums, shrinkage=1)
        case "logistic":
            return logistic_router(layer.blocks, sums.gram, float(sums.counts.sum()), ridge=config.ridge)
        case _:
            return ridge_router(*of_sums, ridge=config.ridge)


def about(inputs: Inputs, weights: str) -> dict[str, Any]:
    """What `extend` needs to know besides the sums: the config of the dense trunk, and whose sums they are."""
    return {"trunk_config": inputs.trunk.stored.config, "weights": weights}


def _writer(directory: Path, inputs: Inputs, weights: str) -> StatisticsWriter:
    trunk = inputs.trunk
    return StatisticsWriter(
        directory,
        layers=trunk.layers,
        width=int(trunk.fields["hidden_size"]),
        experts=inputs.names,
        about=about(inputs, weights),
    )

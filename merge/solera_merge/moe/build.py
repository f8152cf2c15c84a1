"""The `moe` stage: dense specialists in, one MoE checkpoint out, proven before it appears.

open_inputs -> write_moe -> check_output -> check_identity -> fit_routers -> tune_routers -> solera.json -> rename
"""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import DataSource, data_path
from solera_core.digest import tensor_digest
from solera_core.errors import ConfigError
from solera_core.output import InputRecord, check_output, data_record, input_record, write_provenance
from solera_core.plan import Plan
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_core.threads import torch_threads
from solera_core.writer import layout
from solera_merge.moe.calibration import Domain, read_domains
from solera_merge.moe.config import MoeConfig, RouterConfig
from solera_merge.moe.dense import Dense, dense_shapes, is_ffn
from solera_merge.moe.extend import trunk_digest
from solera_merge.moe.fit import (
    TEXT_FITS,
    Calibration,
    about,
    encode_domains,
    fit_routers,
    needs_trunk_copy,
    random_routers,
)
from solera_merge.moe.identity import Identity, check_identity, checked_parameters
from solera_merge.moe.inputs import Inputs, open_inputs
from solera_merge.moe.layers import layer_bytes
from solera_merge.moe.model_router import DOCUMENTS_FIT, REQUEST_TOKENS
from solera_merge.moe.prompts import PROMPT_FITS, prompt_routers
from solera_merge.moe.report import report_moe
from solera_merge.moe.sizes import resize
from solera_merge.moe.statistics_file import STATISTICS_FILE, statistics_bytes
from solera_merge.moe.targets.target import Piece
from solera_merge.moe.trunk import PlannedTrunk, make_trunk, plan_trunk
from solera_merge.moe.tune import TRIALS, tune_routers
from solera_merge.moe.write import moe_specs, replace_routers, torch_dtype_name, write_moe

__all__ = ["build_moe", "plan_moe"]


def plan_moe(config: MoeConfig, ctx: Context) -> Plan:
    """What building would read, write and need; from headers and the calibration files, without weights.

    Raises:
        SoleraError: everything that is wrong with the inputs and that headers and text files can tell.
    """
    inputs, text, merged, warnings = _open(config, ctx)
    return _plan(config, inputs, text, merged, warnings)


def build_moe(config: MoeConfig, out: Path, ctx: Context) -> Path:
    """Build a MoE into `out`, which appears only when all of it is written and has passed the identity check.

    Raises:
        SoleraError: wrong inputs, too little text, a target in the way, no room; VerificationError where what was
            written does not compute what it should. Nothing is left behind.
    """
    check_target(out, overwrite=ctx.overwrite)
    inputs, text, merged, warnings = _open(config, ctx)
    also = (inputs.shared_model,) if inputs.shared_model else ()
    models = [dense.checkpoint for dense in (inputs.base, *inputs.experts, *also)]
    directories = [directory for model in (*models, *merged.models) for directory in model.directories]
    sources = (data_path(source, ctx.base_dir) for _, source in _sources(config.router))
    check_apart(out, directories, [path for path in sources if path is not None])
    plan = _plan(config, inputs, text, merged, warnings)
    require_disk(out, plan.disk_bytes)
    ctx.progress.note("reading the inputs for their digests")
    records = _records(config, inputs, merged, ctx)
    warnings += _check_contents(inputs, records)
    with torch_threads(ctx.threads), staged(out, overwrite=ctx.overwrite) as staging:
        checks, digests = _build(config, inputs, text, warnings, staging, ctx)
        write_provenance(
            staging,
            kind="moe",
            recipe=config.model_dump(mode="json"),
            seed=ctx.seed,
            inputs=records,
            tensors=digests,
            checks=checks,
        )
    return out


@dataclass(frozen=True)
class _Text:
    """The text of a build, read and split."""

    domains: Sequence[Domain]
    unlabelled: Domain | None

    def __bool__(self) -> bool:
        return bool(self.domains) or self.unlabelled is not None


def _sources(router: RouterConfig) -> list[tuple[str, DataSource]]:
    """Every source of text with what it is."""
    labelled = [(f"text of {name}", source) for name, sources in router.data.items() for source in sources]
    return labelled + [("unlabelled text", source) for source in router.unlabelled]


def _open(config: MoeConfig, ctx: Context) -> tuple[Inputs, _Text, PlannedTrunk, list[str]]:
    inputs = open_inputs(config, ctx)
    merged = plan_trunk(config, inputs, ctx)
    router, fields = config.router, inputs.trunk.fields
    warnings = [*inputs.warnings, *merged.warnings]
    options: dict[str, Any] = {"base_dir": ctx.base_dir, "holdout": router.holdout, "seed": ctx.seed}
    domains: list[Domain] = []
    unlabelled: Domain | None = None
    if router.data or router.unlabelled:
        if router.sequence_tokens > fields["max_position_embeddings"]:
            warnings.append(
                f"router.sequence_tokens: {router.sequence_tokens} is more than the trunk's max_position_embeddings; "
                f"sequences of {fields['max_position_embeddings']} are used"
            )
        if router.fit in TEXT_FITS and router.tokens_per_domain < fields["hidden_size"]:
            raise ConfigError(
                f"router.tokens_per_domain: {router.tokens_per_domain} is too little: a router has "
                f"{fields['hidden_size']} inputs, and needs at least as many tokens of every domain "
                "(several thousand are better)"
            )
    if router.data:
        given = {name: router.data[name] for name in inputs.names if name in router.data}
        domains, found = read_domains(given, **options)
        warnings += found
    if router.unlabelled:
        ((unlabelled,), _) = read_domains({"unlabelled": router.unlabelled}, key="router", **options)
    if inputs.shared_model is not None and config.shared is not None:
        warnings.append(
            f"shared: {config.shared.model} adds to every token's output, times {config.shared.residual_scale:g}, and "
            f"the routed experts count {config.shared.routed_scale:g}: that is not what the specialists compute; "
            "checks.sizes in solera.json says what it costs, where there is router.data"
        )
    if router.fit == "none":
        warnings.append(
            "router.fit: none: the rows are zero, so every token goes to the same experts with equal weights; put "
            "your own in, or train them (fit: random starts better: with equal logits the other experts learn nothing)"
        )
    if router.fit in PROMPT_FITS:
        warnings.append(
            f"router.fit: {router.fit}: a router made of a few prompts knows little of the domains; text of every "
            "domain and fit: ridge route far better"
        )
    stored = torch_dtype_name(inputs.trunk, config.dtype)
    if inputs.width % 8 and stored != "float32":
        warnings.append(
            f"in {stored} transformers' default kernel for experts refuses a width that is no multiple of 8, and here "
            f'it is {inputs.width}: load the MoE with experts_implementation="eager", or in float32'
        )
    trunk = inputs.trunk.stored
    unused = [info.nbytes for name, info in trunk.tensors.items() if not is_ffn(name)]
    share = sum(unused) / sum(info.nbytes for info in trunk.tensors.values())
    warnings.append(
        f"of every expert only the feed-forward networks are used; its other {len(unused)} tensors ({share:.0%} of its "
        "bytes: attention, norms, embeddings, head) give way to the trunk's. Where they were fine-tuned too, something "
        "is lost: solera.json says how far they are apart"
    )
    return inputs, _Text(domains, unlabelled), merged, warnings


def _plan(config: MoeConfig, inputs: Inputs, text: _Text, merged: PlannedTrunk, warnings: Sequence[str]) -> Plan:
    trunk, experts = inputs.trunk, len(inputs.experts)
    specs = moe_specs(
        inputs.target, trunk, experts=experts, width=inputs.width, dtype=config.dtype, shared=inputs.shared
    )
    total = sum(spec.size for spec in specs)
    pieces = inputs.target.pieces(trunk.fields, experts=experts, width=inputs.width, shared=inputs.shared)
    in_experts = sum(math.prod(piece.block) for piece in pieces if piece.expert is not None)
    dtypes = {spec.name: spec.dtype for spec in specs}
    output_bytes = sum(spec.nbytes for spec in specs)
    dense = sum(
        math.prod(shape)
        for shape in dense_shapes({**trunk.fields, "intermediate_size": max(e.width for e in inputs.experts)}).values()
    )
    costs = _costs(config, inputs, text, dense_bytes=4 * dense)
    return Plan(
        stage="moe",
        reads=[
            _read_of(trunk, ffn=False),
            *([_read_of(inputs.base, ffn=False)] if trunk is not inputs.base else []),
            *(_read_of(expert, ffn=True) for expert in inputs.experts),
            *([_read_of(inputs.shared_model, ffn=True)] if inputs.shared_model else []),
            *(_merged_of(model) for model in merged.models),
            *(_text_of(domain, config.router.data[domain.name]) for domain in text.domains),
            *([_text_of(text.unlabelled, config.router.unlabelled)] if text.unlabelled else []),
        ],
        writes=[
            *({"what": shard.file, "bytes": shard.nbytes} for shard in layout(specs)),
            *([{"what": STATISTICS_FILE, "bytes": costs.statistics}] if costs.statistics else []),
        ],
        memory_bytes=max(costs.memory, merged.memory_bytes),
        disk_bytes=output_bytes + costs.statistics + costs.scratch + merged.disk_bytes,
        parameters={
            **config.model_dump(mode="json"),
            "trunk_candidates": list(merged.merges),
            "target": inputs.target.name,
            "engine_matrix": _matrix(inputs),
            "expert_width": inputs.width,
            "shared_width": inputs.shared,
            "parameters_total": total,
            "parameters_active": total - in_experts + in_experts // experts * config.top_k,
        },
        rows=[
            {
                "tensor": piece.name,
                "shape": list(piece.shape),
                "dtype": dtypes[piece.name],
                "from": _giver(inputs, piece),
                "source": piece.source or ("zeros" if piece.zero else config.router.fit),
            }
            for piece in pieces
        ],
        warnings=list(warnings),
    )


@dataclass(frozen=True)
class _Costs:
    """Bytes: of memory, of scratch files, of the sums beside the MoE."""

    memory: int
    scratch: int
    statistics: int


def _costs(config: MoeConfig, inputs: Inputs, text: _Text, *, dense_bytes: int) -> _Costs:
    """Everything is run in float32. The identity check holds a MoE of some layers and three dense ones; prompts run
    through a dense model; fits to text and the choice of the temperature hold one layer, the embedding and the head,
    and the sums of a layer, with the states of all tokens in files.
    """
    router, experts = config.router, len(inputs.experts)
    width = int(inputs.trunk.fields["hidden_size"])
    checked = checked_parameters(inputs)
    memory, scratch, sums = checked * 10, checked * 12, 0
    if router.fit in PROMPT_FITS:
        memory = max(memory, dense_bytes)
        scratch = max(scratch, dense_bytes if needs_trunk_copy(inputs) else 0)
    if text:
        layer = layer_bytes(inputs.target, inputs.trunk, experts=experts, width=inputs.width, shared=inputs.shared)
        memory = max(memory, 2 * layer + 4 * 8 * width**2)
        domains = len(text.domains) + experts * (text.unlabelled is not None)
        tokens = router.tokens_per_domain * domains
        tried = round(tokens * router.holdout / (1 - router.holdout)) * TRIALS
        requests = sum(len(domain.held_out) + DOCUMENTS_FIT for domain in text.domains) * REQUEST_TOKENS
        scratch = max(scratch, layer + 4 * width * max(2 * tokens, tried, requests))
    if text.domains and router.fit in TEXT_FITS and router.fit != "nll":
        said = about(inputs, "sha256:" + "0" * 64)
        sums = statistics_bytes(layers=inputs.trunk.layers, width=width, experts=inputs.names, about=said)
    return _Costs(memory + (1 << 28), scratch, sums)


def _text_of(domain: Domain, sources: Sequence[DataSource]) -> dict[str, Any]:
    return {
        "what": f"text of {domain.name!r}",
        "path": ", ".join(source.path for source in sources),
        "bytes": sum(document.n_bytes for document in (*domain.fit, *domain.held_out)),
        "documents": len(domain.fit),
        "documents_held_out": len(domain.held_out),
    }


def _read_of(model: Dense, *, ffn: bool) -> dict[str, Any]:
    tensors = model.stored.tensors
    return {
        "what": model.name,
        "path": str(model.stored.path),
        "bytes": sum(info.nbytes for info in tensors.values()),  # all of it, for the digest in solera.json
        "bytes_used": sum(info.nbytes for name, info in tensors.items() if is_ffn(name) == ffn),
        "kind": "model",
        "ref": model.stored.ref,
        "family": model.family,
        "ffn_width": model.width,
    }


def _merged_of(model: Checkpoint) -> dict[str, Any]:
    size = sum(info.nbytes for info in model.tensors.values())
    return {"what": "trunk", "path": str(model.path), "bytes": size, "kind": "model", "ref": model.ref}


def _giver(inputs: Inputs, piece: Piece) -> str:
    if piece.shared:
        return "shared"
    if piece.source is None:
        return "zeros" if piece.zero else "router"
    return "trunk" if piece.expert is None else inputs.names[piece.expert]


def _matrix(inputs: Inputs) -> dict[str, str]:
    return {v.engine: v.verdict + (f": {v.why}" if v.why else "") for v in inputs.verdicts}


def _records(config: MoeConfig, inputs: Inputs, merged: PlannedTrunk, ctx: Context) -> list[InputRecord]:
    models = list(zip(inputs.names, inputs.experts, strict=True))
    models = models[len(inputs.old.names) :] if inputs.old else [("base", inputs.base), *models]
    if inputs.shared_model is not None:
        models.append(("shared", inputs.shared_model))
    given = [(name, model.stored) for name, model in models] + [(f"trunk: {m.ref}", m) for m in merged.models]
    with ThreadPoolExecutor(ctx.threads or min(os.cpu_count() or 1, 4)) as pool:
        records = list(pool.map(lambda pair: input_record(pair[1], pair[0]), given))
    if inputs.old is not None:
        records = [inputs.old.record(), *records]
    return records + [data_record(what, source, ctx.base_dir) for what, source in _sources(config.router)]


def _check_contents(inputs: Inputs, records: Sequence[InputRecord]) -> list[str]:
    """Experts that are one model under two paths are an error, a copy of the base is worth a warning."""
    seen: dict[str, str] = {}
    names = inputs.names[len(inputs.old.names) if inputs.old else 0 :]
    for name, record in zip(names, records[1 : 1 + len(names)], strict=True):
        if record.digest in seen:
            raise ConfigError(
                f"experts: {seen[record.digest]!r} and {name!r} hold the same weights; "
                "two equal experts only waste memory"
            )
        seen[record.digest] = name
    copy = seen.get(records[0].digest) if inputs.old is None else None
    return [f"expert {copy!r} holds the weights of the base: its feed-forward networks are untuned"] if copy else []


def _build(
    config: MoeConfig,
    inputs: Inputs,
    text: _Text,
    warnings: list[str],
    staging: Path,
    ctx: Context,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write everything but solera.json; the checks and the digest of every tensor."""
    calibration = None
    if text:
        calibration = encode_domains(text.domains, text.unlabelled, inputs, config.router)
        warnings = [*warnings, *calibration.warnings]
    for warning in warnings:
        ctx.progress.note(warning)
    held_out = calibration.held_out if calibration is not None else ()
    (staging / ".trunks").mkdir()
    inputs, trunk = make_trunk(config, inputs, held_out, staging / ".trunks", ctx)
    (staging / ".sizes").mkdir()
    specialists = inputs.experts
    inputs, sizes = resize(config, inputs, calibration, staging / ".sizes", ctx)
    asked = config.router.temperature
    drawn = random_routers(config, inputs, seed=ctx.seed)
    # The routers come last: writing finds damaged inputs, and the identity check holds for any router, so both fail
    # before the long work. A fitted router takes the place of the random one.
    digests = write_moe(
        staging,
        inputs.target,
        inputs.trunk,
        inputs.experts,
        [rows / (1.0 if asked == "auto" else asked) for rows in drawn],
        top_k=config.top_k,
        width=inputs.width,
        dtype=config.dtype,
        sidecars=inputs.base.checkpoint.sidecars,
        threads=ctx.threads,
        progress=ctx.progress,
    )
    checks = check_output(staging)
    ctx.progress.note("identity check")
    identity = check_identity(
        staging, staging / ".identity", inputs, top_k=config.top_k, dtype=config.dtype, threads=ctx.threads
    )
    found = [*_equal_experts(inputs, staging, digests), *_distances(identity, inputs)]
    for note in found:
        ctx.progress.note(note)
    weights = trunk_digest(digests, inputs.target, open_checkpoint(staging, Context()))
    routers, facts = _routers(config, inputs, calibration, staging, ctx, drawn=drawn, weights=weights)
    digests |= routers
    report = _report(replace(inputs, experts=specialists), text, calibration, staging, ctx)
    shutil.rmtree(staging / ".trunks")
    shutil.rmtree(staging / ".sizes")
    said = {
        "trunk": trunk,
        "target": inputs.target.name,
        "engines": _matrix(inputs),
        **sizes,
        "identity": identity.to_json(),
        "router": facts,
        **report,
        "warnings": [*warnings, *found],
    }
    return checks | said, digests


def _report(
    inputs: Inputs, text: _Text, calibration: Calibration | None, staging: Path, ctx: Context
) -> dict[str, Any]:
    """`report`, where there is held-out text of the experts' domains."""
    if calibration is None or not calibration.held_out:
        return {}
    scratch = staging / ".report"
    scratch.mkdir()
    try:
        report = report_moe(staging, inputs, text.domains, calibration, scratch=scratch, ctx=ctx)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for warning in report["warnings"]:
        ctx.progress.note(f"warning: {warning}")
    return {"report": report}


def _routers(
    config: MoeConfig,
    inputs: Inputs,
    calibration: Calibration | None,
    staging: Path,
    ctx: Context,
    *,
    drawn: Sequence[np.ndarray],
    weights: str,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Make the routers, choose among them where there is held-out text, and put them into the written MoE.

    Returns:
        Their digests (none: those that were written stay), and the facts for solera.json.
    """
    fit, asked = config.router.fit, config.router.temperature
    facts: dict[str, Any] = {"fit": fit}
    candidates: dict[str, Any] = {fit: drawn}
    scratch = staging / ".router"
    scratch.mkdir()
    try:
        if fit in PROMPT_FITS:
            rows, facts = prompt_routers(config, inputs, scratch / "trunk", ctx)
            candidates = {fit: rows}
        elif fit in TEXT_FITS:
            assert calibration is not None
            candidates = fit_routers(config, inputs, calibration, staging, scratch, ctx, weights=weights)
            facts["tokens_fit"] = _tokens_fit(inputs, calibration)
            if (staging / STATISTICS_FILE).exists():
                facts["statistics"] = STATISTICS_FILE
        if calibration is not None:
            digests, found = tune_routers(staging, candidates, config, inputs, calibration, scratch, ctx)
            return digests, facts | found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    temperature = 1.0 if asked == "auto" else asked
    facts["temperature"] = temperature
    if fit not in PROMPT_FITS:
        return {}, facts
    rows = [layer / temperature for layer in candidates[fit]]
    return replace_routers(open_checkpoint(staging, Context()), rows), facts


def _tokens_fit(inputs: Inputs, calibration: Calibration) -> dict[str, int]:
    found = {
        inputs.names[e]: text.tokens
        for e, text in zip(calibration.experts, calibration.fit, strict=True)
        if not inputs.is_old(inputs.names[e])
    }
    if inputs.old is not None:
        old = inputs.old.statistics.counts()
        found = {name: int(n) for name, n in zip(inputs.old.names, old, strict=True)} | found
    if calibration.unlabelled is not None:
        found["unlabelled"] = calibration.unlabelled[0].tokens
    return found


def _equal_experts(inputs: Inputs, staging: Path, digests: Mapping[str, str]) -> list[str]:
    """Experts of different models whose feed-forward networks are the same: what was tuned is not in the MoE."""
    networks: list[list[str]] = [[] for _ in inputs.names]
    written = open_checkpoint(staging, Context())
    for piece in inputs.target.pieces(
        inputs.trunk.fields, experts=len(inputs.names), width=inputs.width, shared=inputs.shared
    ):
        if piece.expert is not None:
            size = math.prod(piece.block)
            alone = piece.block == piece.shape  # else all experts lie in one tensor
            digest = digests[piece.name] if alone else tensor_digest(size, partial(_block_of, written, piece))
            networks[piece.expert].append(digest)
    seen: dict[tuple[str, ...], str] = {}
    found: list[str] = []
    for name, network in zip(inputs.names, map(tuple, networks), strict=True):
        if network in seen:
            found.append(f"experts {seen[network]!r} and {name!r} have the same feed-forward networks")
        seen[network] = name
    return found


def _block_of(written: Checkpoint, piece: Piece, start: int, stop: int) -> Any:
    return written.read_raw(piece.name, piece.at + start, piece.at + stop)


def _distances(identity: Identity, inputs: Inputs) -> list[str]:
    """What the identity check saw of the experts' distance from the trunk."""
    found: list[str] = []
    for name, distance in identity.trunk_distance.items():
        if identity.ffn_distance[name] == 0 and not inputs.is_old(name):
            found.append(
                f"expert {name!r}: its feed-forward networks equal the trunk's in every layer looked at; "
                "it adds nothing of its own"
            )
        if distance > 0:
            found.append(
                f"expert {name!r}: its own attention, norms, embeddings and head are {distance:.1%} from the trunk's, "
                "which take their place"
            )
    return found

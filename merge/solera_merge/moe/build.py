"""The `moe` stage: dense specialists in, one MoE checkpoint out, proven before it appears.

open_inputs -> write_moe -> check_output -> check_identity -> fit_routers -> tune_routers -> solera.json -> rename
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import data_path
from solera_core.digest import tensor_digest
from solera_core.errors import ConfigError
from solera_core.output import InputRecord, check_output, data_record, input_record, write_provenance
from solera_core.plan import Plan
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_core.threads import torch_threads
from solera_core.writer import layout
from solera_merge.moe.calibration import Domain, read_domains
from solera_merge.moe.config import MoeConfig
from solera_merge.moe.dense import Dense, dense_shapes, is_ffn
from solera_merge.moe.fit import encode_domains, fit_routers, needs_trunk_copy, random_routers, tune_routers
from solera_merge.moe.identity import Identity, check_identity, checked_parameters
from solera_merge.moe.inputs import Inputs, open_inputs
from solera_merge.moe.prompts import PROMPT_FITS, prompt_routers
from solera_merge.moe.targets.target import Piece
from solera_merge.moe.write import moe_specs, replace_routers, write_moe

__all__ = ["build_moe", "plan_moe"]


def plan_moe(config: MoeConfig, ctx: Context) -> Plan:
    """What building would read, write and need; from headers and the calibration files, without weights.

    Raises:
        SoleraError: everything that is wrong with the inputs and that headers and text files can tell.
    """
    inputs, domains, warnings = _open(config, ctx)
    return _plan(config, inputs, domains, warnings)


def build_moe(config: MoeConfig, out: Path, ctx: Context) -> Path:
    """Build a MoE into `out`, which appears only when all of it is written and has passed the identity check.

    Raises:
        SoleraError: wrong inputs, too little text, a target in the way, no room; VerificationError where what was
            written does not compute what it should. Nothing is left behind.
    """
    check_target(out, overwrite=ctx.overwrite)
    inputs, domains, warnings = _open(config, ctx)
    models = [d for dense in (inputs.trunk, *inputs.experts) for d in dense.checkpoint.directories]
    sources = (data_path(source, ctx.base_dir) for text in config.router.data.values() for source in text)
    check_apart(out, models, [path for path in sources if path is not None])
    plan = _plan(config, inputs, domains, warnings)
    require_disk(out, plan.disk_bytes)
    ctx.progress.note("reading the inputs for their digests")
    records = _records(config, inputs, ctx)
    _check_contents(inputs, records)
    with torch_threads(ctx.threads), staged(out, overwrite=ctx.overwrite) as staging:
        checks, digests = _build(config, inputs, domains, warnings, staging, ctx)
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


def _open(config: MoeConfig, ctx: Context) -> tuple[Inputs, list[Domain], list[str]]:
    inputs = open_inputs(config, ctx)
    router, fields = config.router, inputs.trunk.fields
    warnings = list(inputs.warnings)
    domains: list[Domain] = []
    if router.fit == "ridge":
        if router.sequence_tokens > fields["max_position_embeddings"]:
            warnings.append(
                f"router.sequence_tokens: {router.sequence_tokens} is more than the trunk's max_position_embeddings; "
                f"sequences of {fields['max_position_embeddings']} are used"
            )
        if router.tokens_per_domain < fields["hidden_size"]:
            raise ConfigError(
                f"router.tokens_per_domain: {router.tokens_per_domain} is too little: a router has "
                f"{fields['hidden_size']} inputs, and needs at least as many tokens of every domain "
                "(several thousand are better)"
            )
        domains, found = read_domains(
            {name: router.data[name] for name in inputs.names},
            base_dir=ctx.base_dir,
            holdout=router.holdout,
            seed=ctx.seed,
        )
        warnings += found
    if router.fit in PROMPT_FITS:
        warnings.append(
            f"router.fit: {router.fit}: a router made of a few prompts knows little of the domains; text of every "
            "domain and fit: ridge route far better"
        )
    trunk = inputs.trunk.stored
    unused = [info.nbytes for name, info in trunk.tensors.items() if not is_ffn(name)]
    share = sum(unused) / sum(info.nbytes for info in trunk.tensors.values())
    warnings.append(
        f"of every expert only the feed-forward networks are used; its other {len(unused)} tensors ({share:.0%} of its "
        "bytes: attention, norms, embeddings, head) give way to the trunk's. Where they were fine-tuned too, something "
        "is lost: solera.json says how far they are apart"
    )
    return inputs, domains, warnings


def _plan(config: MoeConfig, inputs: Inputs, domains: Sequence[Domain], warnings: Sequence[str]) -> Plan:
    trunk, experts = inputs.trunk, len(inputs.experts)
    specs = moe_specs(inputs.target, trunk, experts=experts, width=inputs.width, dtype=config.dtype)
    total = sum(spec.size for spec in specs)
    pieces = inputs.target.pieces(trunk.fields, experts=experts, width=inputs.width)
    in_experts = sum(math.prod(piece.block) for piece in pieces if piece.expert is not None)
    dtypes = {spec.name: spec.dtype for spec in specs}
    output_bytes = sum(spec.nbytes for spec in specs)
    dense = sum(
        math.prod(shape) for shape in dense_shapes({**trunk.fields, "intermediate_size": inputs.width}).values()
    )
    ridge = config.router.fit == "ridge"
    runs_trunk = ridge or config.router.fit in PROMPT_FITS
    grams = trunk.layers * int(trunk.fields["hidden_size"]) ** 2 * 8
    checked = checked_parameters(inputs)
    return Plan(
        stage="moe",
        reads=[
            _read_of(trunk, ffn=False),
            *(_read_of(expert, ffn=True) for expert in inputs.experts),
            *(
                {
                    "what": f"text of {domain.name!r}",
                    "path": ", ".join(source.path for source in config.router.data[domain.name]),
                    "bytes": sum(document.n_bytes for document in (*domain.fit, *domain.held_out)),
                    "documents": len(domain.fit),
                    "documents_held_out": len(domain.held_out),
                }
                for domain in domains
            ),
        ],
        writes=[{"what": shard.file, "bytes": shard.nbytes} for shard in layout(specs)],
        # float32 models: the identity check holds a MoE of some layers and three dense ones; the fit one dense model
        # and its Gram matrices; the temperature search the whole MoE.
        memory_bytes=max(checked * 10, (4 * dense + 2 * grams * ridge) * runs_trunk, 4 * total * ridge) + (1 << 28),
        disk_bytes=output_bytes + max(checked * 12, 4 * dense if runs_trunk and needs_trunk_copy(inputs) else 0),
        parameters={
            **config.model_dump(mode="json"),
            "target": inputs.target.name,
            "engine_matrix": _matrix(inputs),
            "expert_width": inputs.width,
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


def _read_of(model: Dense, *, ffn: bool) -> dict[str, Any]:
    tensors = model.stored.tensors
    return {
        "what": model.name,
        "path": str(model.stored.path),
        "bytes": sum(info.nbytes for info in tensors.values()),  # all of it, for the digest in solera.json
        "bytes_used": sum(info.nbytes for name, info in tensors.items() if is_ffn(name) == ffn),
        "ref": model.stored.ref,
        "family": model.family,
        "ffn_width": model.width,
    }


def _giver(inputs: Inputs, piece: Piece) -> str:
    if piece.source is None:
        return "zeros" if piece.zero else "router"
    return "trunk" if piece.expert is None else inputs.names[piece.expert]


def _matrix(inputs: Inputs) -> dict[str, str]:
    return {v.engine: v.verdict + (f": {v.why}" if v.why else "") for v in inputs.verdicts}


def _records(config: MoeConfig, inputs: Inputs, ctx: Context) -> list[InputRecord]:
    models = [("trunk", inputs.trunk), *zip(inputs.names, inputs.experts, strict=True)]
    with ThreadPoolExecutor(ctx.threads or min(os.cpu_count() or 1, 4)) as pool:
        records = list(pool.map(lambda pair: input_record(pair[1].stored, pair[0]), models))
    return records + [
        data_record(f"text of {name}", source, ctx.base_dir)
        for name, sources in config.router.data.items()
        for source in sources
    ]


def _check_contents(inputs: Inputs, records: Sequence[InputRecord]) -> None:
    """Experts that are one model under two paths are an error."""
    seen: dict[str, str] = {}
    for name, record in zip(inputs.names, records[1 : 1 + len(inputs.names)], strict=True):
        if record.digest in seen:
            raise ConfigError(
                f"experts: {seen[record.digest]!r} and {name!r} hold the same weights; "
                "two equal experts only waste memory"
            )
        seen[record.digest] = name


def _build(
    config: MoeConfig,
    inputs: Inputs,
    domains: Sequence[Domain],
    warnings: list[str],
    staging: Path,
    ctx: Context,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write everything but solera.json; the checks and the digest of every tensor."""
    calibration = None
    if config.router.fit == "ridge":
        calibration = encode_domains(domains, inputs, config.router)
        warnings = [*warnings, *calibration.warnings]
    for warning in warnings:
        ctx.progress.note(warning)
    # The routers come last: writing finds damaged inputs, and the identity check holds for any router, so both fail
    # before the long work. A fitted router takes the place of the random one.
    digests = write_moe(
        staging,
        inputs.target,
        inputs.trunk,
        inputs.experts,
        random_routers(config, inputs, seed=ctx.seed),
        top_k=config.top_k,
        width=inputs.width,
        dtype=config.dtype,
        threads=ctx.threads,
        progress=ctx.progress,
    )
    checks = check_output(staging)
    ctx.progress.note("identity check")
    identity = check_identity(
        staging, staging / ".identity", inputs, top_k=config.top_k, dtype=config.dtype, threads=ctx.threads
    )
    found = [*_equal_experts(inputs, staging, digests), *_distances(identity)]
    for note in found:
        ctx.progress.note(note)
    facts: dict[str, Any] = {"fit": config.router.fit}
    if config.router.fit in PROMPT_FITS:
        rows, facts = prompt_routers(config, inputs, staging / ".trunk", ctx)
        digests |= replace_routers(open_checkpoint(staging, Context()), rows)
    if calibration is not None:
        routers = fit_routers(config, inputs, calibration, staging / ".trunk", ctx)
        tuned, facts = tune_routers(staging, routers, config, inputs, calibration, ctx)
        digests |= tuned
    said = {"target": inputs.target.name, "engines": _matrix(inputs)}
    return checks | said | {"identity": identity.to_json(), "router": facts, "warnings": [*warnings, *found]}, digests


def _equal_experts(inputs: Inputs, staging: Path, digests: Mapping[str, str]) -> list[str]:
    """Experts of different models whose feed-forward networks are the same: what was tuned is not in the MoE."""
    networks: list[list[str]] = [[] for _ in inputs.names]
    written = open_checkpoint(staging, Context())
    for piece in inputs.target.pieces(inputs.trunk.fields, experts=len(inputs.names), width=inputs.width):
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


def _distances(identity: Identity) -> list[str]:
    """What the identity check saw of the experts' distance from the trunk."""
    found: list[str] = []
    for name, distance in identity.trunk_distance.items():
        if identity.ffn_distance[name] == 0:
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

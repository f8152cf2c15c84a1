"""The `route` stage: whole models and text in, a router over them out, measured on text that it has not seen.

open models -> read text -> losses of every model on every document -> features -> fit -> report -> rename
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from solera_core.architecture import text_config
from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import Document, data_path, path_bytes
from solera_core.errors import ConfigError, DataError
from solera_core.inspect import parameter_count
from solera_core.output import InputRecord, data_record, input_record, write_provenance
from solera_core.plan import Plan
from solera_core.route import Loader, confidences, directions, mean_states, request_of, write_route
from solera_core.staging import check_apart, check_target, require_disk, staged
from solera_core.threads import torch_threads
from solera_merge.figures import rounded
from solera_merge.moe.calibration import read_domains
from solera_merge.route.config import RouteConfig
from solera_merge.route.fit import (
    Cascade,
    Linear,
    centroid,
    choose_thresholds,
    classifier,
    kmeans,
    path_cost,
    standardisation,
    walk,
)

__all__ = ["build_route", "plan_route", "route_skeleton"]

Array = np.ndarray
_BATCH_TOKENS: Final = 4096
_LEAST_FIT, _LEAST_HELD_OUT = 8, 2  # documents a domain
_SOUND_HELD_OUT: Final = 20
_FOLDS: Final = 4
_PENALTIES: Final = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class _Inputs:
    specialists: Mapping[str, Checkpoint]
    base: Checkpoint | None

    @property
    def all(self) -> list[Checkpoint]:
        return [*self.specialists.values(), *([self.base] if self.base is not None else [])]


@dataclass(frozen=True)
class _Text:
    """Documents of all domains in a row; `fit` says which the fit may see."""

    documents: tuple[Document, ...]
    domains: tuple[str, ...]
    fit: Array  # (N,) bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Losses:
    """Of every document under every specialist, and of the held-out ones under the base (NaN elsewhere)."""

    nats: Array  # (N, E)
    tokens: Array  # (N, E)
    sizes: Array  # bytes, (N,)
    base_nats: Array  # (N,)
    base_tokens: Array  # (N,)

    @property
    def per_byte(self) -> Array:
        """Nats a byte, (N, E): the same measure for every tokenizer."""
        found: Array = self.nats / self.sizes[:, None]
        return found


def plan_route(config: RouteConfig, ctx: Context) -> Plan:
    """What fitting would read, run and write; from headers and the texts, without weights.

    Raises:
        SoleraError: everything that is wrong with models and texts and that headers and text files can tell.
    """
    inputs, text = _open(config, ctx), _read_text(config, ctx)
    return _plan(config, inputs, text, ctx)


def build_route(config: RouteConfig, out: Path, ctx: Context) -> Path:
    """Fit a router over whole models and write it, with a report, to `out`.

    Raises:
        SoleraError: wrong inputs, too little text, a target in the way. Nothing is left behind.
    """
    check_target(out, overwrite=ctx.overwrite)
    inputs, text = _open(config, ctx), _read_text(config, ctx)
    sources = [source for given in config.data.values() for source in given]
    texts = [path for source in sources if (path := data_path(source, ctx.base_dir)) is not None]
    check_apart(out, [directory for model in inputs.all for directory in model.directories], texts)
    plan = _plan(config, inputs, text, ctx)
    require_disk(out, plan.disk_bytes)
    ctx.progress.note("reading the inputs for their digests")
    records = {name: input_record(model, name, attest=ctx.attest) for name, model in inputs.specialists.items()}
    base = None if inputs.base is None else input_record(inputs.base, "base", attest=ctx.attest)
    _refuse_equal(list(records.values()))
    with torch_threads(ctx.threads), staged(out, overwrite=ctx.overwrite) as staging:
        load = Loader(ctx, dtype=config.dtype, keep=1)
        losses = _measure(config, inputs, text, load, ctx)
        fitted = _fit(config, inputs, text, losses, load, ctx)
        content = {
            "method": fitted.method,
            "base": None if base is None else asdict(base),
            "specialists": [
                {**asdict(record), "parameters": parameter_count(inputs.specialists[name]).active}
                for name, record in records.items()
            ],
            "request_tokens": config.request_tokens,
            **fitted.content,
        }
        write_route(staging, content, fitted.matrices, base_dir=ctx.base_dir.absolute(), home=out.absolute())
        report = _report(inputs, text, losses, fitted, plan.warnings)
        for warning in report["warnings"]:
            ctx.progress.note(f"warning: {warning}")
        data = [data_record(f"data.{d}", s, ctx.base_dir) for d, given in config.data.items() for s in given]
        write_provenance(
            staging,
            kind="route",
            recipe=config.model_dump(mode="json"),
            seed=ctx.seed,
            inputs=[*records.values(), *([] if base is None else [base]), *data],
            tensors={},
            checks=report,
        )
    return out


def route_skeleton(config: RouteConfig, directory: Path, ctx: Context) -> None:
    """A directory that opens like the route that will be, for planners: the models by reference, no decision.

    Raises:
        CheckpointError: a model cannot be opened.
    """
    inputs = _open(config, ctx)
    directory.mkdir(parents=True)
    content: dict[str, Any] = {
        "method": "cascade",  # which needs no matrices
        "base": None,
        "specialists": [{"name": n, "ref": m.ref, "digest": ""} for n, m in inputs.specialists.items()],
        "request_tokens": config.request_tokens,
        "order": [],
        "thresholds": [],
        "confidence": config.confidence,
    }
    write_route(directory, content, {}, base_dir=ctx.base_dir.absolute(), home=directory.absolute())


def _open(config: RouteConfig, ctx: Context) -> _Inputs:
    specialists = {s.name: open_checkpoint(s.model, ctx) for s in config.specialists}
    base = None if config.base_model is None else open_checkpoint(config.base_model, ctx)
    return _Inputs(specialists, base)


def _read_text(config: RouteConfig, ctx: Context) -> _Text:
    domains, warnings = read_domains(
        config.data, base_dir=ctx.base_dir, holdout=config.holdout, seed=ctx.seed, key="data"
    )
    documents: list[Document] = []
    names: list[str] = []
    fit: list[bool] = []
    for domain in domains:
        n_held_out = max(round(config.documents_per_domain * config.holdout / (1 - config.holdout)), _LEAST_HELD_OUT)
        parts = domain.fit[: config.documents_per_domain], domain.held_out[:n_held_out]
        if len(parts[0]) < _LEAST_FIT or len(parts[1]) < _LEAST_HELD_OUT:
            raise DataError(
                f"data.{domain.name}: {len(parts[0])} documents to fit on and {len(parts[1])} held out are too little: "
                f"at least {_LEAST_FIT} and {_LEAST_HELD_OUT} are needed (holdout: {config.holdout:g}, "
                f"documents_per_domain: {config.documents_per_domain}); add text, or cut plain text into more "
                "documents (chunk_chars)"
            )
        if len(parts[1]) < _SOUND_HELD_OUT:
            warnings.append(f"data.{domain.name}: only {len(parts[1])} documents are held out: its figures are rough")
        documents += [*parts[0], *parts[1]]
        names += [domain.name] * (len(parts[0]) + len(parts[1]))
        fit += [True] * len(parts[0]) + [False] * len(parts[1])
    return _Text(tuple(documents), tuple(names), np.array(fit), tuple(warnings))


def _plan(config: RouteConfig, inputs: _Inputs, text: _Text, ctx: Context) -> Plan:
    def row(what: str, model: Checkpoint) -> dict[str, Any]:
        return {"what": what, "path": str(model.path), "bytes": sum(t.nbytes for t in model.tensors.values())}

    reads = [row(f"specialist {name}", model) for name, model in inputs.specialists.items()]
    reads += [] if inputs.base is None else [row("base", inputs.base)]
    for domain, sources in config.data.items():
        for source in sources:
            path = data_path(source, ctx.base_dir)
            reads.append({"what": f"data.{domain}", "path": source.path, "bytes": path and path_bytes(path)})
    width = 0 if inputs.base is None else int(text_config(inputs.base.config).get("hidden_size") or 0)
    rows = max(config.clusters or 0, 8 * len(inputs.specialists))
    matrices = 0 if inputs.base is None else (rows + 2) * width * 4
    elements = [sum(t.size for t in model.tensors.values()) for model in inputs.all]
    n = len(text.documents)
    return Plan(
        stage="route",
        reads=reads,
        writes=[
            {"what": "route.safetensors", "bytes": matrices},
            {"what": "route.json, solera.json", "bytes": 1 << 14},
        ],
        memory_bytes=max(elements) * _DTYPE_BYTES[config.dtype] + n * width * 16 + (1 << 27),
        disk_bytes=matrices + (1 << 14),
        parameters={**config.model_dump(mode="json"), "seed": ctx.seed},
        rows=[
            {
                "domain": domain,
                "fit": int(sum(f for d, f in zip(text.domains, text.fit, strict=True) if d == domain)),
                "held out": int(sum(not f for d, f in zip(text.domains, text.fit, strict=True) if d == domain)),
                "bytes scored by every specialist": sum(
                    doc.n_bytes for doc, d in zip(text.documents, text.domains, strict=True) if d == domain
                ),
            }
            for domain in config.data
        ],
        warnings=text.warnings,
    )


def _refuse_equal(records: Sequence[InputRecord]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if (other := seen.get(record.digest)) is not None:
            raise ConfigError(
                f"specialists: {other!r} and {record.name!r} hold the same weights; no router can tell them apart"
            )
        seen[record.digest] = record.name


# measuring -----------------------------------------------------------------------------------------------------------


def _measure(config: RouteConfig, inputs: _Inputs, text: _Text, load: Loader, ctx: Context) -> _Losses:
    from solera_core.likelihood import score_documents

    def scores(model: Checkpoint, documents: Sequence[Document], what: str) -> tuple[list[float], list[int]]:
        loaded, tokenizer = load(model)
        try:
            with ctx.progress.task(f"{what} on all text", len(documents), "documents") as task:
                found = score_documents(
                    loaded,
                    tokenizer,
                    documents,
                    window_tokens=config.window_tokens,
                    batch_tokens=_BATCH_TOKENS,
                    advance=task.advance,
                )
        except DataError as e:
            raise DataError(f"{what}: {e}") from e
        return [s.nll for s in found], [s.tokens for s in found]

    columns = [scores(model, text.documents, f"specialist {name!r}") for name, model in inputs.specialists.items()]
    base_nats, base_tokens = np.full(len(text.documents), math.nan), np.zeros(len(text.documents), dtype=np.int64)
    if inputs.base is not None:
        held_out = np.flatnonzero(~text.fit)
        base_nats[held_out], base_tokens[held_out] = scores(inputs.base, [text.documents[i] for i in held_out], "base")
    return _Losses(
        np.array([nats for nats, _ in columns]).T,
        np.array([tokens for _, tokens in columns]).T,
        np.array([d.n_bytes for d in text.documents], dtype=np.float64),
        base_nats,
        base_tokens,
    )


# fitting -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fitted:
    """A decision as it is stored, what it says of every document, and what was tried on the way."""

    method: str
    content: Mapping[str, Any]
    matrices: Mapping[str, Array]
    answers: Array  # (N,)
    parameters: float  # active parameters that a request costs, on average over the held-out ones
    tried: Sequence[Mapping[str, Any]]


def _fit(config: RouteConfig, inputs: _Inputs, text: _Text, losses: _Losses, load: Loader, ctx: Context) -> _Fitted:
    requests = [request_of(document) for document in text.documents]
    costs = [float(parameter_count(model).active) for model in inputs.specialists.values()]
    if inputs.base is None:
        return _fit_cascade(config, inputs, text, losses, requests, costs, load, ctx)
    model, tokenizer = load(inputs.base)
    with ctx.progress.task("hidden states of the base", len(requests), "documents") as task:
        states_ND = mean_states(model, tokenizer, requests, tokens=config.request_tokens, advance=task.advance)
    mean_D, scale_D = (m.astype(np.float32).astype(np.float64) for m in standardisation(states_ND[text.fit]))
    x_ND = directions(states_ND, mean_D, scale_D)
    per_byte_NE = losses.per_byte
    experts = len(inputs.specialists)
    labels_N = (
        np.array([config.names.index(domain) for domain in text.domains])
        if config.needs_domains
        else per_byte_NE.argmin(axis=1)
    )
    seen = np.flatnonzero(text.fit)

    def by_classifier(rows: Array, penalty: float) -> Linear:
        return classifier(x_ND[rows], labels_N[rows], experts, penalty=penalty)

    def by_kmeans(rows: Array, clusters: int) -> Linear:
        return kmeans(x_ND[rows], per_byte_NE[rows], clusters=clusters, seed=ctx.seed)

    fits: list[tuple[str, dict[str, Any], Callable[[Array], Linear]]] = []
    if config.method in ("auto", "centroid"):
        fits.append(("centroid", {}, lambda rows: centroid(x_ND[rows], labels_N[rows], experts)))
    if config.method in ("auto", "classifier"):
        fits += [("classifier", {"penalty": p}, partial(by_classifier, penalty=p)) for p in _PENALTIES]
    if config.method in ("auto", "kmeans"):
        sizes = [config.clusters] if config.clusters else [k * experts for k in (1, 2, 4, 8)]
        fits += [("kmeans", {"clusters": k}, partial(by_kmeans, clusters=k)) for k in sizes]
    tried: list[dict[str, Any]] = []
    for name, setting, fit in fits:
        # Four quarters, each evenly over the domains; each is judged by a fit to the other three.
        answers = np.empty(len(seen), dtype=np.int64)
        for fold in range(_FOLDS):
            answers[fold::_FOLDS] = fit(np.delete(seen, np.s_[fold::_FOLDS])).decide(x_ND[seen[fold::_FOLDS]])
        loss, accuracy = per_byte_NE[seen, answers].mean(), (answers == labels_N[seen]).mean()
        figures = {"bits_per_byte": rounded(loss / math.log(2)), "accuracy": rounded(accuracy)}
        tried.append({"method": name, **setting, **figures})
    best = min(range(len(fits)), key=lambda i: (tried[i]["bits_per_byte"], -tried[i]["accuracy"], i))
    method, setting, fit = fits[best]
    linear = fit(seen)
    # As it will be on disk: what is reported is what is used.
    linear = Linear(
        linear.weight.astype(np.float32).astype(np.float64),
        linear.bias.astype(np.float32).astype(np.float64),
        linear.choice,
    )
    answer_N = linear.decide(x_ND)
    spent = parameter_count(inputs.base).active + float(np.mean([costs[e] for e in answer_N[~text.fit]]))
    return _Fitted(
        method,
        {"choice": list(linear.choice), **setting},
        {"mean": mean_D, "scale": scale_D, "weight": linear.weight, "bias": linear.bias},
        answer_N,
        spent,
        tried,
    )


def _fit_cascade(
    config: RouteConfig,
    inputs: _Inputs,
    text: _Text,
    losses: _Losses,
    requests: Sequence[str],
    costs: Sequence[float],
    load: Loader,
    ctx: Context,
) -> _Fitted:
    columns: list[list[float]] = []
    with ctx.progress.task("confidence of every specialist", len(costs), "specialists") as task:
        for model in inputs.specialists.values():
            loaded, tokenizer = load(model)
            columns.append(
                confidences(loaded, tokenizer, requests, tokens=config.request_tokens, kind=config.confidence)
            )
            task.advance()
    sure_NE = np.array(columns).T
    order = sorted(range(len(costs)), key=lambda e: (costs[e], e))
    cascade: Cascade = choose_thresholds(
        order, sure_NE[text.fit], losses.per_byte[text.fit], costs, tolerance=config.tolerance
    )
    answer_N = walk(cascade, sure_NE)
    content = {
        "order": list(cascade.order),
        "thresholds": list(cascade.thresholds),
        "confidence": config.confidence,
    }
    return _Fitted("cascade", content, {}, answer_N, path_cost(cascade, answer_N[~text.fit], costs), [])


# the report ----------------------------------------------------------------------------------------------------------


def _report(inputs: _Inputs, text: _Text, losses: _Losses, fitted: _Fitted, warnings: Sequence[str]) -> dict[str, Any]:
    """What solera.json says of the route, on held-out text."""
    names = list(inputs.specialists)
    domains_N = np.array(text.domains)
    best_N = losses.per_byte.argmin(axis=1)
    held_out = ~text.fit
    answer_N = fitted.answers

    def row(rows: Array, answers_N: Array) -> dict[str, float]:
        nats, tokens = losses.nats[rows, answers_N[rows]], losses.tokens[rows, answers_N[rows]]
        return _loss(nats.sum(), tokens.sum(), losses.sizes[rows].sum())

    by_domain: dict[str, Any] = {}
    for domain in dict.fromkeys(text.domains):
        rows = np.flatnonzero(held_out & (domains_N == domain))
        base = _loss(losses.base_nats[rows].sum(), losses.base_tokens[rows].sum(), losses.sizes[rows].sum())
        by_domain[domain] = {
            **({} if inputs.base is None else {"base": base}),
            "specialists": {name: row(rows, np.full(len(domains_N), e)) for e, name in enumerate(names)},
            "routed": row(rows, answer_N),
            "oracle": row(rows, best_N),
            "sent_to": {name: rounded(float((answer_N[rows] == e).mean())) for e, name in enumerate(names)},
        }

    def mean(of: Any) -> float:
        return float(np.mean([of(found)["bits_per_byte"] for found in by_domain.values()]))

    single = {name: mean(lambda found, name=name: found["specialists"][name]) for name in names}
    means = {
        **({} if inputs.base is None else {"base": mean(lambda found: found["base"])}),
        **single,
        "routed": mean(lambda found: found["routed"]),
        "oracle": mean(lambda found: found["oracle"]),
    }
    named = all(domain in names for domain in by_domain)
    right_N = (
        np.array([answer == names.index(d) for answer, d in zip(answer_N, domains_N, strict=True)]) if named else None
    )
    best_single = min(single, key=lambda name: single[name])
    said = list(warnings)
    if means["routed"] >= single[best_single]:
        said.append(
            f"the route ({means['routed']:.4f} bits a byte on held-out text) is no better than {best_single!r} alone "
            f"({single[best_single]:.4f})"
        )
    if idle := [name for e, name in enumerate(names) if not (answer_N[held_out] == e).any()]:
        said.append(f"no held-out text is sent to {', '.join(idle)}")
    return {
        "method": fitted.method,
        "tried": list(fitted.tried),
        "documents": {
            domain: {
                "fit": int((text.fit & (domains_N == domain)).sum()),
                "held_out": int((held_out & (domains_N == domain)).sum()),
            }
            for domain in by_domain
        },
        "accuracy": {
            "best": rounded(float((answer_N == best_N)[held_out].mean())),
            "domain": None if right_N is None else rounded(float(right_N[held_out].mean())),
            "chance": rounded(1 / len(names)),
        },
        "held_out": by_domain,
        "mean_bits_per_byte": {name: rounded(value) for name, value in means.items()},
        "active_parameters": round(fitted.parameters),
        "warnings": said,
    }


def _loss(nats: float, tokens: float, size: float) -> dict[str, float]:
    """`nll` in nats a token of the model's own, and bits a byte, which every tokenizer shares."""
    return {"nll": rounded(float(nats / tokens)), "bits_per_byte": rounded(float(nats / math.log(2) / size))}

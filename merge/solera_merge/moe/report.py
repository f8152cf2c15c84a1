"""What a MoE keeps of its specialists, and why the rest is lost: measured on held-out text at every build.

    base -> average merge, model-level router -> this MoE -> oracle-routed MoE -> specialist
                                                     |- ROUTER loss -|- TRUNK loss -|

Every model runs over the same held-out tokens, one layer of it in memory (`layers.run_layers`). Figures that compare
models have an interval: a paired bootstrap over documents.

    C documents, E experts, L layers, N tokens, R resamples
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.inspect import parameter_count
from solera_core.views import Derived, view
from solera_merge.figures import rounded
from solera_merge.moe.calibration import Domain, Sequences
from solera_merge.moe.dense import Dense, read_dense
from solera_merge.moe.fit import Calibration
from solera_merge.moe.inputs import Inputs
from solera_merge.moe.layers import Chunk, Layers, Way, chunks_of, dense_layers, moe_layers, run_layers
from solera_merge.moe.measures import (
    Balance,
    Routing,
    balance,
    document_weights,
    figure,
    recovered,
    routing,
    sampled,
)
from solera_merge.moe.model_router import LEAST_DOCUMENTS, ModelRouter, fit_model_router
from solera_merge.moe.routing import choices, forced_route

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

__all__ = ["average_of", "report_moe"]

Array = np.ndarray

_UNSURE: Final = 0.9
"""Mean top-k mass below which engines that do not renormalise are warned about."""


def report_moe(
    directory: Path,
    inputs: Inputs,
    domains: Sequence[Domain],
    calibration: Calibration,
    *,
    scratch: Path,
    ctx: Context,
) -> dict[str, Any]:
    """Measure a written MoE, its inputs and its yardsticks on the held-out text of the experts' domains.

    Args:
        directory: of the MoE, its routers in place.
        inputs: what it is made of.
        domains: the documents, by the names of experts.
        calibration: the same as tokens.
        scratch: a directory for states.
        ctx: threads, progress, and the seed of the resamples.

    Returns:
        `checks.report` of solera.json. Losses are nats a token; `null` where something cannot be measured, with the
        reason among `missing`.
    """
    names = [inputs.names[e] for e in calibration.experts]
    text = _Text(calibration.held_out)
    dense = partial(_dense, text=text, scratch=scratch, ctx=ctx)
    missing: dict[str, str] = {}
    base = None if inputs.old is not None else dense(inputs.base, inputs.base, "base")
    losses: dict[str, list[Array] | None] = {"base": base}
    specialists = {
        name: dense(expert, expert, f"specialist {name}")
        for name, expert in zip(inputs.names, inputs.experts, strict=True)
        if not inputs.is_old(name)
    }
    if old := [name for name in inputs.names if name not in specialists]:
        reason = f"of the extended MoE's base and of {', '.join(old)} only what is in the MoE is here"
        missing |= dict.fromkeys(("base", "average", "model_router"), reason)
        if set(old) & set(names):
            missing["specialists"] = reason
    average = None if old else average_of(inputs.base, inputs.experts)
    if average is None:
        missing.setdefault("average", "the experts differ in width")
    losses["average"] = None if average is None else dense(average, average, "average merge")
    router, reason = _model_router(inputs, names, domains, text, missing, scratch, ctx)
    if router is None:
        missing["model_router"] = reason
        losses["model_router"] = None
    else:
        own = [specialists[name] for name in names]
        losses["model_router"] = [
            np.array([own[int(e)][d][c] for c, e in enumerate(answer_C)]) for d, answer_C in enumerate(router.answers)
        ]
    measured = _moe(directory, calibration.experts, text, scratch, ctx)
    losses |= {"oracle": measured.oracle, "moe": measured.moe}
    return _facts(directory, inputs, names, text, losses, specialists, measured, router, missing, ctx.seed)


class _Text:
    """Held-out text of several domains, and which document every token is of."""

    def __init__(self, texts: Sequence[Sequences]) -> None:
        self.texts = texts
        self.chunks = chunks_of(texts)
        starts = np.cumsum([0, *(text.tokens for text in texts)])
        self.starts = starts[:-1]
        self.documents = [_document_of(text) for text in texts]
        self.tokens = [np.zeros(len(text.documents)) for text in texts]
        for chunk in self.chunks:
            scored_BT = chunk.targets.numpy().copy()
            scored_BT[:, 0] = False  # nothing predicts it
            self.add(self.tokens, chunk, scored_BT.astype(np.float64))

    def add(self, totals: Sequence[Array], chunk: Chunk, values_BT: Array) -> None:
        """Sum what the tokens of a chunk have into their documents' totals."""
        first = chunk.start - int(self.starts[chunk.text])
        of_N = self.documents[chunk.text][first : first + values_BT.size]
        np.add.at(totals[chunk.text], of_N, values_BT.reshape(-1))


def _document_of(text: Sequences) -> Array:
    """(N,), the index of every token's document."""
    of_N = np.zeros(text.tokens, dtype=np.int64)
    for first, _ in text.documents[1:]:
        of_N[first:] += 1
    return of_N


def _losses(layers: Layers, ways: Sequence[Way], text: _Text, title: str, scratch: Path, ctx: Context) -> list[Any]:
    """For every way of running a model: of each domain, the nats of every document, (C,)."""
    import torch

    totals = [[np.zeros(len(tokens_C)) for tokens_C in text.tokens] for _ in ways]

    def score(way: int, chunk: Chunk, logits_BTV: "torch.Tensor") -> None:
        nll_BT = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().transpose(1, 2), chunk.ids[:, 1:], reduction="none"
        ).double()
        nll_BT[~chunk.targets[:, 1:]] = 0.0
        text.add(totals[way], chunk, torch.nn.functional.pad(nll_BT, (1, 0)).numpy())

    with ctx.progress.task(f"report: {title}", len(layers), "layers") as task:
        run_layers(layers, text.chunks, ways, score, scratch=scratch, task=task)
    return totals


def _dense(trunk: Dense, ffn: Dense, title: str, *, text: _Text, scratch: Path, ctx: Context) -> list[Array]:
    def plain(model: "PreTrainedModel", layer: int, domain: int) -> AbstractContextManager[None]:
        del model, layer, domain
        return nullcontext()

    layers = dense_layers(trunk, ffn, scratch / "layer", threads=ctx.threads)
    (found,) = _losses(layers, [plain], text, title, scratch, ctx)
    return list(found)


def average_of(base: Dense, experts: Sequence[Dense]) -> Dense | None:
    """The mean of the specialists' weights, tensor by tensor as it is read; None where their shapes differ.

    Rounded to the base's number formats. What not every expert stores is the base's.
    """
    if any(expert.width != base.width for expert in experts):
        return None
    stored = [expert.stored for expert in experts]
    tensors: dict[str, str | Derived] = {}
    for name, info in base.stored.tensors.items():
        everywhere = all(name in model.tensors and model.tensors[name].shape == info.shape for model in stored)
        tensors[name] = Derived(info, partial(_mean, stored, name)) if everywhere else name
    return read_dense("average", view(base.stored, tensors, what={"average": [model.ref for model in stored]}))


def _mean(models: Sequence[Any], name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
    total = np.zeros(stop - start, dtype=np.float64)
    for model in models:
        total += model.read_flat(name, start, stop)
    mean: npt.NDArray[np.float32] = (total / len(models)).astype(np.float32)
    return mean


def _model_router(
    inputs: Inputs,
    names: Sequence[str],
    domains: Sequence[Domain],
    text: _Text,
    missing: Mapping[str, str],
    scratch: Path,
    ctx: Context,
) -> tuple[ModelRouter | None, str]:
    """A router over the whole specialists, or why there is none."""
    if "model_router" in missing:
        return None, missing["model_router"]
    given = {domain.name: domain for domain in domains}
    ordered = [given[name] for name in names]
    if few := [domain.name for domain in ordered if len(domain.fit) < LEAST_DOCUMENTS]:
        return None, f"{', '.join(few)}: fewer than {LEAST_DOCUMENTS} documents to fit on"
    counts = [len(tokens_C) for tokens_C in text.tokens]
    return fit_model_router(inputs.base, ordered, counts, scratch=scratch, ctx=ctx), ""


@dataclass(frozen=True)
class _Measured:
    """The MoE under its own routers and under the oracle's: nats by domain and document; `routes[d][layer]`."""

    moe: list[Array]
    oracle: list[Array]
    routes: list[list[Routing]]


def _moe(directory: Path, experts: Sequence[int], text: _Text, scratch: Path, ctx: Context) -> _Measured:
    watch = _Watch([[len(ids) for ids in sequences.ids] for sequences in text.texts])

    def oracle(model: "PreTrainedModel", layer: int, domain: int) -> AbstractContextManager[None]:
        del layer
        return forced_route(model, experts[domain])

    layers = moe_layers(open_checkpoint(directory, Context()), scratch / "layer")
    moe, forced = _losses(layers, [watch.way, oracle], text, "the MoE and its oracle", scratch, ctx)
    return _Measured(list(moe), list(forced), watch.finish(len(layers)))


class _Watch:
    """Keeps the router's logits of one layer and domain, and of every other only their figures."""

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        self._lengths = lengths
        self._at: tuple[int, int] | None = None
        self._logits: list[Array] = []
        self._chosen: list[Array] = []
        self._found: dict[tuple[int, int], Routing] = {}

    def way(self, model: "PreTrainedModel", layer: int, domain: int) -> AbstractContextManager[None]:
        if self._at != (layer, domain):
            self._close()
            self._at = (layer, domain)
        return self._watching(model)

    def finish(self, layers: int) -> list[list[Routing]]:
        """By domain and layer."""
        self._close()
        return [[self._found[layer, d] for layer in range(layers)] for d in range(len(self._lengths))]

    @contextmanager
    def _watching(self, model: "PreTrainedModel") -> "Iterator[None]":
        with choices(model) as seen:
            yield
        for logits_NE, chosen_Nk in seen:
            self._logits.append(logits_NE)
            self._chosen.append(chosen_Nk)

    def _close(self) -> None:
        if self._at is None:
            return
        logits_NE, chosen_Nk = np.concatenate(self._logits), np.concatenate(self._chosen)
        self._found[self._at] = routing(logits_NE, chosen_Nk, self._lengths[self._at[1]])
        self._logits, self._chosen = [], []


# the record ----------------------------------------------------------------------------------------------------------


def _facts(
    directory: Path,
    inputs: Inputs,
    names: Sequence[str],
    text: _Text,
    losses: Mapping[str, Sequence[Array] | None],
    specialists: Mapping[str, Sequence[Array]],
    measured: _Measured,
    router: ModelRouter | None,
    missing: Mapping[str, str],
    seed: int,
) -> dict[str, Any]:
    documents = [int((tokens_C > 0).sum()) for tokens_C in text.tokens]
    weights = [document_weights(n, seed=(seed << 16) + d) for d, n in enumerate(documents)]

    def samples(nats: Sequence[Array] | None) -> list[Array] | None:
        """Of each domain, (1 + R,). Documents without a scored token (the last, cut off) do not count."""
        if nats is None:
            return None
        return [
            sampled(nats_C[tokens_C > 0], tokens_C[tokens_C > 0], weights_RC)
            for nats_C, tokens_C, weights_RC in zip(nats, text.tokens, weights, strict=True)
        ]

    of = {model: samples(nats) for model, nats in losses.items()}
    of_specialists = {name: samples(nats) for name, nats in specialists.items()}
    own = [of_specialists[name] for name in names if name in of_specialists]
    specialist = [found[d] for d, found in enumerate(own) if found is not None] if len(own) == len(names) else None
    of["specialist"] = specialist

    def by_domain(combine: Callable[..., Array | None], *models: str) -> dict[str, Any] | None:
        """The figure of every domain and of the domains' mean losses; None where a model is missing."""
        found = [of[model] for model in models]
        rows: list[list[Array]] = [row for row in found if row is not None]
        if len(rows) < len(found):
            return None
        domains = {
            name: figure(combine(*(row[d] for row in rows)), documents=documents[d]) for d, name in enumerate(names)
        }
        mean = combine(*(np.mean(row, axis=0) for row in rows))
        return {"mean": figure(mean, documents=min(documents)), "domains": domains}

    def values(rows: Sequence[Array] | None) -> dict[str, Any] | None:
        if rows is None:
            return None
        return {
            "mean": rounded(float(np.mean([row[0] for row in rows]))),
            "domains": {name: rounded(float(row[0])) for name, row in zip(names, rows, strict=True)},
        }

    def less(a: Array, b: Array) -> Array:
        difference: Array = a - b
        return difference

    load_LE = np.mean([[layer.load for layer in domain] for domain in measured.routes], axis=0)
    evenness = [balance(load_E) for load_E in load_LE]
    built, dense = parameter_count(open_checkpoint(directory, Context())), parameter_count(inputs.base.stored)
    facts: dict[str, Any] = {
        "documents": dict(zip(names, documents, strict=True)),
        "tokens": {name: int(tokens_C.sum()) for name, tokens_C in zip(names, text.tokens, strict=True)},
        "nll": {
            "base": values(of["base"]),
            "specialists": {name: values(found) for name, found in of_specialists.items()},
            **{model: values(of[model]) for model in ("average", "model_router", "oracle", "moe")},
        },
        "recovered": by_domain(recovered, "base", "moe", "specialist"),
        "router_loss": by_domain(less, "moe", "oracle"),
        "trunk_loss": by_domain(less, "oracle", "specialist"),
        "against": {
            model: by_domain(less, "moe", model) for model in ("average", "model_router") if of[model] is not None
        },
        "model_router": None
        if router is None
        else {
            "method": router.method,
            "accuracy": rounded(router.accuracy),
            "documents_fit": router.documents_fit,
        },
        "experts": list(inputs.names),
        "routes": {
            name: _route(layers, e)
            for name, e, layers in zip(names, [inputs.names.index(n) for n in names], measured.routes, strict=True)
        },
        "load": {
            "max_over_mean": [rounded(b.max_over_mean, 4) for b in evenness],
            "cv": [rounded(b.cv, 4) for b in evenness],
            "dead": [[layer, inputs.names[e]] for layer, b in enumerate(evenness) for e in b.dead],
        },
        "size": {
            "parameters": built.total,
            "active": built.active,
            "bytes": built.bytes,
            "dense_parameters": dense.total,
            "dense_bytes": dense.bytes,
        },
        "missing": dict(missing),
    }
    return facts | {"warnings": _warnings(facts, inputs, names, evenness)}


def _route(layers: Sequence[Routing], expert: int) -> dict[str, Any]:
    """The figures of one domain, a list over the layers each; `share` has the experts' in each."""
    return {
        "share": [[round(float(x), 4) for x in layer.share] for layer in layers],
        "accuracy": [rounded(float(layer.first[expert]), 4) for layer in layers],
        "entropy": [rounded(layer.entropy, 4) for layer in layers],
        "switch_rate": [rounded(layer.switch_rate, 4) for layer in layers],
        "top_k_mass": [rounded(layer.top_k_mass, 4) for layer in layers],
    }


def _warnings(facts: Mapping[str, Any], inputs: Inputs, names: Sequence[str], evenness: Sequence[Balance]) -> list[str]:
    """What a careful person would want to know of these figures."""
    nll = facts["nll"]
    moe = nll["moe"]
    found: list[str] = []
    if nll["average"] is not None and nll["average"]["mean"] <= moe["mean"]:
        found.append(
            f"the average merge is no worse on held-out text ({nll['average']['mean']:.4f} nats a token, "
            f"this MoE {moe['mean']:.4f}), at the size of one model"
        )
    behind = facts["against"].get("model_router")
    if behind is not None and (behind["mean"]["low"] or 0) > 0:
        found.append(
            f"a router over the whole specialists is better on held-out text ({nll['model_router']['mean']:.4f} nats "
            f"a token, this MoE {moe['mean']:.4f})"
        )
    base = nll["base"]
    if base is not None and (worse := [name for name in names if moe["domains"][name] >= base["domains"][name]]):
        found.append(f"this MoE is no better than the base on the text of {', '.join(worse)}")
    if facts["recovered"] is not None and (
        idle := [name for name in names if facts["recovered"]["domains"][name] is None]
    ):
        found.append(f"{', '.join(idle)}: the specialist is no better than the base on its own domain's text")
    every = len(names) == len(inputs.names)  # else an expert may be idle for want of its text
    if every and (dead := facts["load"]["dead"]):
        by_name = {
            name: [layer for layer, _ in group]
            for name, group in itertools.groupby(sorted(dead, key=lambda d: (d[1], d[0])), key=lambda d: d[1])
        }
        said = "; ".join(f"{name!r} in {len(layers)} of {len(evenness)} layers" for name, layers in by_name.items())
        found.append(f"experts that hardly a token visits: {said}")
    mass = float(np.mean([row["top_k_mass"] for row in facts["routes"].values()]))
    plain = [v.engine for v in inputs.verdicts if v.verdict == "approximate" and "renormal" in v.why]
    if plain and mass < _UNSURE:
        found.append(
            f"{', '.join(plain)} does not renormalise, so it multiplies the experts' output by {mass:.2f} on average"
        )
    return found

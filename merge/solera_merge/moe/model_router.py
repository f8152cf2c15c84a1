"""The yardstick of a MoE: the same specialists as whole models, each document sent to one of them.

The parts are those of `solera route`, fitted on the same calibration text: the mean of the base's last hidden states
over the first tokens of a request, and the better of nearest centroids and logistic regression by cross-validation.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from solera_core.causal_lm import load_tokenizer
from solera_core.context import Context
from solera_core.prefix import prefix_id, prompt_ids
from solera_core.route import directions, request_of
from solera_merge.moe.calibration import Domain, Sequences
from solera_merge.moe.dense import Dense
from solera_merge.moe.layers import chunks_of, dense_layers, run_layers
from solera_merge.route.fit import Linear, centroid, classifier, standardisation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["DOCUMENTS_FIT", "LEAST_DOCUMENTS", "REQUEST_TOKENS", "ModelRouter", "fit_model_router"]

DOCUMENTS_FIT: Final = 64
"""Documents of every domain that go into the fit."""

REQUEST_TOKENS: Final = 256
"""Tokens of a document that the router sees."""

LEAST_DOCUMENTS: Final = 8
"""Of every domain, without which no router is fitted."""

_FOLDS: Final = 4
_PENALTIES: Final = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)

Array = np.ndarray


@dataclass(frozen=True)
class ModelRouter:
    """A router over whole models, and what it makes of the held-out documents.

    Attributes:
        method: `centroid` or `classifier`.
        answers: of each domain, the index (among the domains) of the specialist for every held-out document.
        documents_fit: that it learned from.
    """

    method: str
    answers: tuple[Array, ...]
    documents_fit: int

    @property
    def accuracy(self) -> float:
        """Share of the held-out documents that go to their domain's specialist, mean over the domains."""
        return float(np.mean([(answer_C == d).mean() for d, answer_C in enumerate(self.answers)]))


def fit_model_router(
    base: Dense, domains: Sequence[Domain], held_out: Sequence[int], *, scratch: Path, ctx: Context
) -> ModelRouter:
    """Fit on the documents of the domains that are for fitting, and route the first `held_out` others of each."""
    tokenizer = load_tokenizer(base.checkpoint.path)
    tokenizer.model_max_length = 1 << 30  # requests are cut here
    longest = min(REQUEST_TOKENS, int(base.fields["max_position_embeddings"]))
    fit = [domain.fit[:DOCUMENTS_FIT] for domain in domains]
    rest = [domain.held_out[:count] for domain, count in zip(domains, held_out, strict=True)]
    requests = [
        _ids(tokenizer, request_of(document), longest) for part in (fit, rest) for text in part for document in text
    ]
    states_ND = _mean_states(base, requests, first=prefix_id(tokenizer), scratch=scratch, ctx=ctx)
    labels_N = np.repeat(np.arange(len(domains)), [len(text) for text in fit])
    seen = len(labels_N)
    mean_D, scale_D = standardisation(states_ND[:seen])
    x_ND = directions(states_ND, mean_D, scale_D)
    method, linear = _fit(x_ND[:seen], labels_N, len(domains))
    edges = np.cumsum([len(text) for text in rest])[:-1]
    return ModelRouter(method, tuple(np.split(linear.decide(x_ND[seen:]), edges)), seen)


def _fit(x_ND: Array, labels_N: Array, domains: int) -> tuple[str, Linear]:
    """The better one by cross-validated accuracy; the simpler of equals."""

    def fitted(rows: Any, penalty: float | None) -> Linear:
        if penalty is None:
            return centroid(x_ND[rows], labels_N[rows], domains)
        return classifier(x_ND[rows], labels_N[rows], domains, penalty=penalty)

    every = np.arange(len(x_ND))
    right: dict[float | None, float] = {}
    for penalty in (None, *_PENALTIES):
        folds = [
            fitted(np.delete(every, np.s_[fold::_FOLDS]), penalty).decide(x_ND[fold::_FOLDS]) == labels_N[fold::_FOLDS]
            for fold in range(_FOLDS)
        ]
        right[penalty] = float(np.concatenate(folds).mean())
    best = max(right, key=lambda penalty: right[penalty])
    return "centroid" if best is None else "classifier", fitted(every, best)


def _ids(tokenizer: Any, request: str, longest: int) -> tuple[int, ...]:
    ids = prompt_ids(tokenizer, request) if request else []
    start = prefix_id(tokenizer)
    if not ids and start is not None:
        ids = [start]
    return tuple(ids[:longest]) or (0,)


def _mean_states(
    base: Dense, requests: Sequence[tuple[int, ...]], *, first: int | None, scratch: Path, ctx: Context
) -> Array:
    """Mean of the last hidden states (behind the last norm) over the tokens of every request, (N, D) float64.

    A token that all requests begin with is left out, unless there is nothing else.
    """
    layers = dense_layers(base, base, scratch / "layer", threads=ctx.threads)
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i]), i))  # those of one length make a batch
    ids = tuple(requests[i] for i in order)
    chunks = chunks_of([Sequences(ids, tuple((True,) * len(request) for request in ids))])
    skips = [1 if len(request) > 1 and request[0] == first else 0 for request in ids]
    means: list[Array] = []
    last = len(layers) - 1

    def way(model: "PreTrainedModel", layer: int, text: int) -> AbstractContextManager[None]:
        del text
        return _keep_means(model, skips, means) if layer == last else nullcontext()

    def ignore(way: int, chunk: Any, logits_BTV: "torch.Tensor") -> None:
        del way, chunk, logits_BTV

    with ctx.progress.task("router over whole models", len(layers), "layers") as task:
        run_layers(layers, chunks, [way], ignore, scratch=scratch, task=task)
    found_ND = np.empty((len(requests), layers.width))
    found_ND[order] = means
    return found_ND


@contextmanager
def _keep_means(model: "PreTrainedModel", skips: Sequence[int], means: list[Array]) -> Iterator[None]:
    """Appends the mean state of every sequence of a batch, less its first `skips` tokens."""

    def hook(module: Any, args: Any, states_BTD: Any) -> None:
        del module, args
        for states_TD in states_BTD:
            means.append(states_TD[skips[len(means)] :].double().mean(dim=0).numpy())

    handle = model.get_submodule("model.norm").register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

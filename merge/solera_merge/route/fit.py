"""The fits as formulas: from directions (and losses, or labels) to a decision.

N documents, D width of the base, E specialists, R rows; X (N, D) unit vectors, losses (N, E) in nats a byte.
Everything is float64. A decision of a feature router is `choice[argmax_r(x . weight[r] + bias[r])]`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Cascade",
    "Linear",
    "centroid",
    "choose_thresholds",
    "classifier",
    "kmeans",
    "path_cost",
    "standardisation",
    "walk",
]

Array = np.ndarray

_LAMBDAS = (0.0, *(10.0**x for x in np.arange(-4, 3.5, 0.5)))
"""Prices of computing, in nats a byte for all the parameters of the dearest path, that `choose_thresholds` tries."""

_CANDIDATES = 65
"""Thresholds tried a specialist: quantiles of its confidences."""

_ROUNDS = 100
"""Of k-means at most; it stops as soon as nothing moves."""


@dataclass(frozen=True)
class Linear:
    """weight (R, D), bias (R), choice: the specialist of every row."""

    weight: Array
    bias: Array
    choice: tuple[int, ...]

    def decide(self, x_ND: Array) -> Array:
        """The specialist's index for every request, (N,)."""
        found: Array = np.asarray(self.choice)[(x_ND @ self.weight.T + self.bias).argmax(axis=1)]
        return found


@dataclass(frozen=True)
class Cascade:
    """Specialists by index in the order they are asked; thresholds of all but the last."""

    order: tuple[int, ...]
    thresholds: tuple[float, ...]


def standardisation(states_ND: Array) -> tuple[Array, Array]:
    """Mean (D) and scale (D) of the states; a dimension that never moves gets the scale 1."""
    scale_D = states_ND.std(axis=0)
    return states_ND.mean(axis=0), np.where(scale_D > 1e-6 * (np.abs(states_ND).max() + 1e-30), scale_D, 1.0)


def centroid(x_ND: Array, labels_N: Array, experts: int) -> Linear:
    """The nearest mean of the specialists' labelled requests: |x - m|^2 is least where x.m - |m|^2 / 2 is largest.

    A specialist that no request is labelled with has no row.
    """
    present = [e for e in range(experts) if (labels_N == e).any()]
    means_RD = np.stack([x_ND[labels_N == e].mean(axis=0) for e in present])
    return Linear(means_RD, -0.5 * (means_RD**2).sum(axis=1), tuple(present))


def kmeans(x_ND: Array, losses_NE: Array, *, clusters: int, seed: int) -> Linear:
    """Clusters of requests, and for each the specialist with the smallest mean loss on it (arXiv 2505.19797).

    Lloyd's rounds from k-means++ seeds. Deviations from the paper: the feature is a mean hidden state, not that of an
    embedding model; the score is the loss of the text, not the share of right answers; one specialist is taken, there
    is no vote.
    """
    draw = np.random.Generator(np.random.Philox(key=seed))
    centres_RD = x_ND[[int(draw.integers(len(x_ND)))]]
    while len(centres_RD) < min(clusters, len(x_ND)):
        away_N = _distances(x_ND, centres_RD).min(axis=1)
        if away_N.sum() <= 1e-12:
            break  # fewer different requests than clusters
        centres_RD = np.concatenate([centres_RD, x_ND[[int(draw.choice(len(x_ND), p=away_N / away_N.sum()))]]])
    nearest_N = _distances(x_ND, centres_RD).argmin(axis=1)
    for _ in range(_ROUNDS):
        present = np.unique(nearest_N)
        centres_RD = np.stack([x_ND[nearest_N == r].mean(axis=0) for r in present])
        before_N, nearest_N = nearest_N, _distances(x_ND, centres_RD).argmin(axis=1)
        if np.array_equal(present[nearest_N], before_N):
            break
    everywhere = int(losses_NE.mean(axis=0).argmin())
    choice = tuple(
        int(losses_NE[nearest_N == r].mean(axis=0).argmin()) if (nearest_N == r).any() else everywhere
        for r in range(len(centres_RD))
    )
    return Linear(centres_RD, -0.5 * (centres_RD**2).sum(axis=1), choice)


def classifier(x_ND: Array, labels_N: Array, experts: int, *, penalty: float) -> Linear:
    """Multinomial logistic regression: mean cross-entropy + penalty / 2 |W|^2, solved by L-BFGS; the bias is free.

    Every class counts as if it had equally many requests.
    """
    from scipy.optimize import minimize

    present = [e for e in range(experts) if (labels_N == e).any()]
    onehot_NR = np.stack([labels_N == e for e in present], axis=1).astype(np.float64)
    share_N = (onehot_NR / onehot_NR.sum(axis=0)).sum(axis=1) / len(present)
    width, rows = x_ND.shape[1], len(present)

    def loss(flat: Array) -> tuple[float, Array]:
        weight_RD, bias_R = flat[: rows * width].reshape(rows, width), flat[rows * width :]
        logits_NR = x_ND @ weight_RD.T + bias_R
        top_N = logits_NR.max(axis=1, keepdims=True)
        exp_NR = np.exp(logits_NR - top_N)
        total_N = exp_NR.sum(axis=1, keepdims=True)
        nll_N = (np.log(total_N) + top_N)[:, 0] - (logits_NR * onehot_NR).sum(axis=1)
        error_NR = (exp_NR / total_N - onehot_NR) * share_N[:, None]
        gradient = np.concatenate([(error_NR.T @ x_ND + penalty * weight_RD).ravel(), error_NR.sum(axis=0)])
        return float(share_N @ nll_N + 0.5 * penalty * (weight_RD**2).sum()), gradient

    solved = minimize(loss, np.zeros(rows * (width + 1)), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    flat: Array = solved.x
    return Linear(flat[: rows * width].reshape(rows, width), flat[rows * width :], tuple(present))


def walk(cascade: Cascade, sure_NE: Array) -> Array:
    """The specialist's index for every request, given how confident each would be in it, (N,)."""
    answer_N = np.full(len(sure_NE), cascade.order[-1])
    left_N = np.ones(len(sure_NE), dtype=bool)
    for e, threshold in zip(cascade.order[:-1], cascade.thresholds, strict=True):
        taken_N = left_N & (sure_NE[:, e] >= threshold)
        answer_N[taken_N] = e
        left_N &= ~taken_N
    return answer_N


def choose_thresholds(
    order: Sequence[int], sure_NE: Array, losses_NE: Array, costs_E: Sequence[float], *, tolerance: float
) -> Cascade:
    """The cheapest thresholds whose mean loss is at most `1 + tolerance` times the best that was found.

    For a given price of computing the thresholds are found from the end: what happens to a request that goes on is
    then known. Every price of a grid gives one candidate; all of them are walked, and the cheapest good one is taken.
    A request costs what all specialists cost that were asked; one that is not worth asking is left out of the order.
    """
    full = sum(costs_E)
    found: dict[Cascade, tuple[float, float]] = {}
    for price in _LAMBDAS:
        ahead_N = losses_NE[:, order[-1]] + price * costs_E[order[-1]] / full
        kept: list[tuple[int, float]] = []
        for e in reversed(order[:-1]):
            asked = price * costs_E[e] / full  # paid whether the request stays or goes on
            sure_N = sure_NE[:, e]
            tried = np.quantile(sure_N, np.linspace(1, 0, _CANDIDATES), method="higher")
            outcomes = {t: np.where(sure_N >= t, losses_NE[:, e], ahead_N) + asked for t in tried if math.isfinite(t)}
            best = min(outcomes, key=lambda t: outcomes[t].mean(), default=None)
            if best is not None and outcomes[best].mean() < ahead_N.mean():  # else it is not worth asking
                kept.append((e, float(best)))
                ahead_N = outcomes[best]
        kept.reverse()
        cascade = Cascade((*(e for e, _ in kept), order[-1]), tuple(t for _, t in kept))
        answer_N = walk(cascade, sure_NE)
        loss = float(losses_NE[np.arange(len(answer_N)), answer_N].mean())
        found[cascade] = (loss, path_cost(cascade, answer_N, costs_E))
    least = min(loss for loss, _ in found.values())
    good = {c: (cost, loss) for c, (loss, cost) in found.items() if loss <= least * (1 + tolerance) + 1e-12}
    return min(good, key=lambda c: good[c])


def path_cost(cascade: Cascade, answer_N: Array, costs_E: Sequence[float]) -> float:
    """Mean cost of a request: of all specialists up to the one that answers."""
    until = np.cumsum([costs_E[e] for e in cascade.order])
    return float(np.mean([until[cascade.order.index(int(e))] for e in answer_N]))


def _distances(x_ND: Array, centres_RD: Array) -> Array:
    """Squared, (N, R)."""
    dots_NR = x_ND @ centres_RD.T
    found: Array = (x_ND**2).sum(axis=1)[:, None] - 2 * dots_NR + (centres_RD**2).sum(axis=1)[None, :]
    found[found < 0] = 0.0  # rounding
    return found

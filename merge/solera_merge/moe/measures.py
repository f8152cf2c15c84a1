"""The figures of a MoE's report, as pure functions of router logits, chosen experts and losses by document.

E experts, N tokens, k experts a token, R resamples, C documents
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

__all__ = ["Balance", "Routing", "balance", "document_weights", "figure", "recovered", "routing", "sampled"]

Array = np.ndarray

_RESAMPLES: Final = 1000
_LEAST_DOCUMENTS: Final = 8
"""Below this a bootstrap says nothing, and no interval is given."""

_DEAD: Final = 0.01


@dataclass(frozen=True)
class Routing:
    """What one layer's router does with one text.

    Attributes:
        share: (E,), mean weight of every expert after renormalisation over the chosen; sums to 1.
        load: (E,), share of all choices that fall on every expert; sums to 1.
        first: (E,), share of the tokens whose first choice it is; sums to 1.
        entropy: of the softmax over all experts, in nats, mean over the tokens; at most ln E.
        top_k_mass: what the chosen experts hold of that softmax, mean over the tokens. An engine that does not
            renormalise scales the layer's output by it.
        switch_rate: share of adjacent tokens of a sequence whose first choices differ.
    """

    share: Array
    load: Array
    first: Array
    entropy: float
    top_k_mass: float
    switch_rate: float


def routing(logits_NE: Array, chosen_Nk: Array, lengths: Sequence[int]) -> Routing:
    """The figures of one layer on one text.

    Args:
        logits_NE: of the router.
        chosen_Nk: the experts that each token visits, the first choice first.
        lengths: of the sequences that the tokens stand in, in order.
    """
    experts, k = logits_NE.shape[1], chosen_Nk.shape[1]
    shifted_NE = logits_NE.astype(np.float64) - logits_NE.max(axis=1, keepdims=True)
    exp_NE = np.exp(shifted_NE)
    total_N1 = exp_NE.sum(axis=1, keepdims=True)
    p_NE = exp_NE / total_N1
    entropy_N = np.log(total_N1[:, 0]) - (p_NE * shifted_NE).sum(axis=1)
    mass_Nk = np.take_along_axis(p_NE, chosen_Nk, axis=1)
    weight_Nk = mass_Nk / mass_Nk.sum(axis=1, keepdims=True)
    first_N = chosen_Nk[:, 0]
    tokens = len(first_N)
    inside_N = np.ones(tokens, dtype=bool)
    inside_N[np.cumsum([0, *lengths[:-1]])] = False  # nothing stands before the first token of a sequence
    switched_N = (first_N[1:] != first_N[:-1])[inside_N[1:]]
    return Routing(
        share=np.bincount(chosen_Nk.ravel(), weight_Nk.ravel(), minlength=experts) / tokens,
        load=np.bincount(chosen_Nk.ravel(), minlength=experts) / (tokens * k),
        first=np.bincount(first_N, minlength=experts) / tokens,
        entropy=float(entropy_N.mean()),
        top_k_mass=float(mass_Nk.sum(axis=1).mean()),
        switch_rate=float(switched_N.mean()) if len(switched_N) else 0.0,
    )


@dataclass(frozen=True)
class Balance:
    """How evenly the experts of a layer are used.

    Attributes:
        max_over_mean: load of the busiest expert over the mean; 1 is even, E the worst.
        cv: coefficient of variation of the loads; 0 is even.
        dead: experts that get less than 1 % of the mean load.
    """

    max_over_mean: float
    cv: float
    dead: tuple[int, ...]


def balance(load_E: Array) -> Balance:
    """Of the loads of a layer (they sum to 1)."""
    mean = float(load_E.mean())
    return Balance(
        float(load_E.max()) / mean,
        float(load_E.std()) / mean,
        tuple(int(e) for e in np.flatnonzero(load_E < _DEAD * mean)),
    )


def document_weights(documents: int, *, seed: int) -> Array:
    """(1 + R, C): how often each document counts: once, and then as often as each of R bootstrap samples draws it.

    The same weights for every model make the comparison of two models a paired one.
    """
    draw = np.random.Generator(np.random.Philox(key=seed))
    drawn_RC = draw.multinomial(documents, np.full(documents, 1 / documents), size=_RESAMPLES)
    return np.concatenate([np.ones((1, documents)), drawn_RC.astype(np.float64)])


def sampled(nats_C: Array, tokens_C: Array, weights_RC: Array) -> Array:
    """Nats a token, (1 + R,): of all documents, and of every resample."""
    found: Array = (weights_RC @ nats_C) / (weights_RC @ tokens_C)
    return found


def recovered(base_R: Array, moe_R: Array, specialist_R: Array) -> Array | None:
    """(base - moe) / (base - specialist), (1 + R,): the share of the specialist's gain that the MoE keeps.

    None where the specialist gains nothing over the base; NaN in resamples in which it does not.
    """
    gain_R = base_R - specialist_R
    if not gain_R[0] > 0:
        return None
    share_R: Array = np.where(gain_R > 0, (base_R - moe_R) / np.where(gain_R > 0, gain_R, 1.0), np.nan)
    return share_R


def figure(samples_R: Array | None, *, documents: int) -> dict[str, Any] | None:
    """The value and its 95 % interval (percentiles of the resamples), for solera.json; None stays None.

    With fewer than 8 documents (in the smallest domain) there is no interval.
    """
    if samples_R is None:
        return None
    low = high = None
    if documents >= _LEAST_DOCUMENTS and np.isfinite(samples_R[1:]).mean() > 0.99:
        low, high = (round(float(x), 5) for x in np.nanpercentile(samples_R[1:], [2.5, 97.5]))
    return {"value": round(float(samples_R[0]), 5) + 0.0, "low": low, "high": high}

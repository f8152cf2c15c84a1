"""The router by multinomial logistic regression.

E experts, D model width, n tokens of a block, N all tokens
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

__all__ = ["logistic_router"]

_ITERATIONS = 60

Blocks = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Reads all text once more: states (n, D) and labels (n, E)."""


def logistic_router(blocks: Blocks, gram_DD: np.ndarray, tokens: float, *, ridge: float) -> np.ndarray:
    """Router rows W (E, D) with the smallest cross-entropy of softmax(W x) against the labels.

        min  1/N sum CE(softmax(W x), y)  +  ridge / 2 * trace(X'X) / (N D) * |W|^2

    by L-BFGS. States are read again for every evaluation, so they may lie on disk. The search runs in coordinates in
    which they are uncorrelated (the Cholesky factor of X'X), which takes some tens of evaluations instead of hundreds.
    There is no intercept, because routers have none: the solution is the best one without it.

    Args:
        blocks: the states and their labels, read afresh at every call.
        gram_DD: X'X, float64.
        tokens: N.
        ridge: penalty, relative to the mean square of a state's entries.

    Returns:
        (E, D) float64; its rows add up to 0.
    """
    from scipy.linalg import solve_triangular
    from scipy.optimize import minimize

    width = len(gram_DD)
    square = float(np.trace(gram_DD)) / (tokens * width)
    factor_DD = np.linalg.cholesky(gram_DD / tokens + ridge * square * np.eye(width))  # lower
    experts = next(blocks())[1].shape[1]

    def rows(v: np.ndarray) -> np.ndarray:  # W = V F^-1
        found: np.ndarray = solve_triangular(factor_DD, v.reshape(experts, width).T, lower=True, trans=1).T
        return found

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        w_ED = rows(v)
        total = 0.0
        slope_ED = np.zeros_like(w_ED)
        for x_nD, y_nE in blocks():
            x64_nD = x_nD.astype(np.float64)
            logits_nE = x64_nD @ w_ED.T
            logits_nE -= logits_nE.max(axis=1, keepdims=True)
            log_p_nE = logits_nE - np.log(np.exp(logits_nE).sum(axis=1, keepdims=True))
            total -= float((y_nE * log_p_nE).sum())
            slope_ED += (np.exp(log_p_nE) - y_nE).T @ x64_nD
        value = total / tokens + ridge / 2 * square * float((w_ED**2).sum())
        slope_ED = slope_ED / tokens + ridge * square * w_ED
        return value, solve_triangular(factor_DD, slope_ED.T, lower=True).T.ravel()

    found: Any = minimize(
        loss, np.zeros(experts * width), jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS, "maxcor": 20}
    )
    w_ED = rows(np.asarray(found.x))
    return np.asarray(w_ED - w_ED.mean(axis=0))

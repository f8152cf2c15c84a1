"""The router as formulas: rows from statistics, rows from chance, and the search for its temperature.

E experts, D model width, N calibration tokens, X (N, D) router inputs, Y (N, E) one-hot domain labels
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["REFINEMENTS", "SCALES", "random_router", "ridge_router", "search_scale", "uniform_router"]

SCALES = (0.0625, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
"""The coarse grid of `search_scale`. A ridge fit predicts 0/1 labels, so its logits differ by about 1 and the mix of
the top k stays soft; confident routing needs several times that, and a mismatched trunk may prefer less."""

REFINEMENTS = 5
"""Golden-section steps of `search_scale`: the bracket, a factor of 16 wide, shrinks to about a quarter."""


def ridge_router(gram_DD: np.ndarray, sums_ED: np.ndarray, counts_E: np.ndarray, *, ridge: float) -> np.ndarray:
    """Router rows W (E, D) that predict the centred domain label of a token from its state, by ridge regression.

        W' = (X'X + lambda I)^-1 X'(Y - 1 p'),    p = counts / N,    lambda = ridge * trace(X'X) / D

    which needs X only through sums over tokens, so it streams and adds up over batches and experts:
    X'X is `gram_DD`, column e of X'Y is `sums_ED[e]`, and X'1 p' is the sum over all tokens times the shares.

    The method is DUME's (arXiv 2603.29765), as is reading the states under teacher forcing. Deviations from its
    authors' code: the targets are centred, where theirs are 0/1 with an intercept, because the formats have none; the
    penalty is relative to the mean diagonal of X'X, where theirs is an absolute 0.01, so that one number serves every
    layer, width and amount of text; the rows keep their length, where theirs are scaled to length 1 (one temperature,
    measured, takes that place); sums are float64, theirs float32.

    Args:
        gram_DD: X'X, float64.
        sums_ED: sum of the states of every domain, float64.
        counts_E: tokens of every domain.
        ridge: relative penalty, above 0.

    Returns:
        (E, D) float64. Its rows add up to 0: only differences between experts count.
    """
    counts_E = counts_E.astype(np.float64)
    shares_E = counts_E / counts_E.sum()
    targets_ED = sums_ED - shares_E[:, None] * sums_ED.sum(axis=0)[None, :]
    width = gram_DD.shape[0]
    penalty = ridge * float(np.trace(gram_DD)) / width
    weights_DE: np.ndarray = np.linalg.solve(gram_DD + penalty * np.eye(width), targets_ED.T)
    return weights_DE.T


def random_router(name: str, shape: tuple[int, int], *, std: float, seed: int) -> np.ndarray:
    """Router rows drawn from N(0, std^2), keyed by (seed, tensor name): the same whatever else is drawn, or when.

    Args:
        name: the router tensor's name in the checkpoint.
        shape: (E, D).
        std: Mixtral's own initialisation uses the config's `initializer_range`.
        seed: root of the randomness.

    Returns:
        (E, D) float32.
    """
    return (_generator(name, seed).standard_normal(shape) * std).astype(np.float32)


def uniform_router(name: str, shape: tuple[int, int], *, bound: float, seed: int) -> np.ndarray:
    """Router rows drawn evenly from [-bound, bound], keyed as `random_router`'s are; (E, D) float32."""
    return _generator(name, seed).uniform(-bound, bound, shape).astype(np.float32)


def _generator(name: str, seed: int) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(f"router:{seed}:{name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def search_scale(
    losses: Callable[[Sequence[float]], Sequence[float]], *, refinements: int = REFINEMENTS
) -> tuple[float, dict[float, float]]:
    """The scale (1 / temperature) of the router's logits with the smallest loss, and every scale tried with its loss.

    The coarse grid `SCALES` first, then golden-section steps on log(scale) between the neighbours of its best point.
    Deterministic; ties go to the smaller scale. The loss need not be unimodal: the best of all tried is returned.

    Args:
        losses: of several scales at once; called once for the grid and at most once a refinement.
        refinements: golden-section steps.
    """
    tried = dict(zip(SCALES, losses(SCALES), strict=True))

    def best() -> float:
        return min(tried, key=lambda scale: (tried[scale], scale))

    at = SCALES.index(best())
    low, high = math.log(SCALES[max(at - 1, 0)]), math.log(SCALES[min(at + 1, len(SCALES) - 1)])
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(refinements):
        # Three significant digits: a readable number, and the inner point of the last step is found again in `tried`.
        left = float(f"{math.exp(high - golden * (high - low)):.3g}")
        right = float(f"{math.exp(low + golden * (high - low)):.3g}")
        if new := [scale for scale in dict.fromkeys((left, right)) if scale not in tried]:
            tried |= zip(new, losses(new), strict=True)
        if tried[left] <= tried[right]:
            high = math.log(right)
        else:
            low = math.log(left)
    return best(), dict(sorted(tried.items()))

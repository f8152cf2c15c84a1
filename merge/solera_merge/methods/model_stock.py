"""Model Stock: as far from the base towards the mean of the fine-tunes as the angle between them justifies."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.reduction import gram
from solera_merge.signs import total

__all__ = ["model_stock", "ratio"]


def model_stock(tensor: Tensor, /, *, filter_wise: bool = False) -> Formula:
    """W = W_0 + t mean_i(W_i - W_0), t = N cos / (1 + (N-1) cos), cos = the mean over pairs of cos(tau_i, tau_j).

    Model Stock: All we need is just a few fine-tuned models, arXiv 2403.19522 (its rule for N models); tau_i = W_i -
    W_0. Norms and dot products in fp64. The paper has one t a layer, that is a tensor, as here; with `filter_wise`
    every row of it (last axis) has its own.

    The paper takes the angle for acute. A negative cos counts as 0 here, which gives the base: fine-tunes that point
    away from each other share no direction. mergekit lets t become negative or exceed 1 there and grow without bound
    towards cos = -1 / (N-1). A zero tau_i has no direction: its pairs count with cos = 0, as in mergekit.

    mergekit bounds the product of two norms from below by 1e-6, which takes the cosine of small tensors and rows for
    smaller than it is; and in float16 the products underflow, so that it stays near the base. Neither is done here.

    Args:
        tensor: base and at least two models; read once more for the angles, except filter-wise.
        filter_wise: a t for every row.

    Returns:
        The formula of a block of whole rows: base [n], N models [n] -> [n].
    """
    if filter_wise:
        return _filter_wise(max(tensor.shape[-1] if tensor.shape else 1, 1))
    t = ratio(gram(tensor))
    return lambda block: _towards_mean(block, block.deltas, t)


def ratio(products: Sequence[Sequence[float]]) -> Float32:
    """The interpolation ratio t, 0 to 1, from the inner products of the task vectors [N][N]."""
    norms = [math.sqrt(products[i][i]) for i in range(len(products))]
    cosines = [
        products[i][j] / norms[i] / norms[j] if norms[i] > 0 and norms[j] > 0 else 0.0
        for i, j in combinations(range(len(products)), 2)
    ]
    return _ratio(np.asarray(math.fsum(cosines) / len(cosines)), len(products))


def _filter_wise(width: int) -> Formula:
    def formula(block: Block) -> Float32:
        deltas = block.deltas
        wide = [delta.astype(np.float64).reshape(-1, width) for delta in deltas]
        norms = [np.sqrt(np.sum(x * x, axis=1)) for x in wide]
        cosine = np.zeros_like(norms[0])
        for i, j in combinations(range(len(wide)), 2):
            product = norms[i] * norms[j]
            cosine += np.sum(wide[i] * wide[j], axis=1) / np.where(product > 0, product, 1.0)
        pairs = len(wide) * (len(wide) - 1) // 2
        return _towards_mean(block, deltas, np.repeat(_ratio(cosine / pairs, len(wide)), width))

    return formula


def _ratio(cosine: npt.NDArray[np.float64], count: int) -> Float32:
    """The interpolation ratio t, 0 to 1, of every mean cosine."""
    cosine = np.clip(cosine, 0.0, 1.0)
    return (count * cosine / (1 + (count - 1) * cosine)).astype(np.float32)


def _towards_mean(block: Block, deltas: Sequence[Float32], t: Float32) -> Float32:
    assert block.base is not None
    out = total(deltas)
    out /= np.float32(len(deltas))
    out *= t
    out += block.base
    return out

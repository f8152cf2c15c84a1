"""The steps that methods on task vectors share: sparsify -> elect a sign -> combine -> scale -> add to the base.

A method of the family is one choice for each: `on_base(sparsify, combine)`, where `sparsify` is made by a function of
this file and `combine` is `weighted_sum` or `disjoint_merge` of `signs.py`.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.masks import bernoulli, words
from solera_merge.reduction import sums_of_magnitudes
from solera_merge.selection import Kept

__all__ = [
    "Combine",
    "Sparsify",
    "check_window",
    "drop_at_random",
    "drop_by_rank",
    "keep",
    "keep_norm",
    "norm_factors",
    "on_base",
    "rank_tables",
    "rescale_factors",
    "row_ranks",
]

Sparsify: TypeAlias = Callable[[Block], list[Float32]]
"""The task vectors of a block with most elements set to 0, [n] each."""

Combine: TypeAlias = Callable[[Sequence[Float32]], Float32]
"""Task vectors [n] -> the merged one [n]."""


def on_base(sparsify: Sparsify, combine: Combine) -> Formula:
    """W = W_0 + combine(sparsify(tau)), a formula of a block: base [n], N models [n] -> [n]."""

    def formula(block: Block) -> Float32:
        out = combine(sparsify(block))
        assert block.base is not None
        out += block.base
        return out

    return formula


def keep(kept: Sequence[Kept], factors: Sequence[np.float32] | None = None) -> Sparsify:
    """Only the selected elements of every task vector, one selection a model; perhaps times a factor a model."""

    def sparsify(block: Block) -> list[Float32]:
        chosen = [delta * k.keeps(delta, block.start) for delta, k in zip(block.deltas, kept, strict=True)]
        for delta, factor in zip(chosen, factors or [], strict=factors is not None):
            delta *= factor
        return chosen

    return sparsify


def keep_norm(tensor: Tensor, kept: Sequence[Kept]) -> list[np.float32]:
    """What the selected elements of a task vector are multiplied by so that they have the L1 norm of all: N factors.

    Args:
        tensor: base and models; read once.
        kept: one selection a model.
    """

    def before_and_after(block: Block) -> list[Float32]:
        deltas = block.deltas
        return [*deltas, *(delta * k.keeps(delta, block.start) for delta, k in zip(deltas, kept, strict=True))]

    sums = sums_of_magnitudes(tensor, before_and_after) or [0.0] * 2 * len(kept)
    return norm_factors(sums[: len(kept)], sums[len(kept) :])


def norm_factors(before: Sequence[float], after: Sequence[float]) -> list[np.float32]:
    """The quotients of norms before and after a selection; 1 where nothing is left."""
    return [np.float32(b / a if a > 0 else 1.0) for b, a in zip(before, after, strict=True)]


def drop_at_random(keys: Sequence[int], density: Sequence[float], *, rescale: bool) -> Sparsify:
    """m_i tau_i, divided by density_i with `rescale`; m_i ~ Bernoulli(density_i) (DARE, arXiv 2311.03099, section 3).

    The rescale is the paper's, so the expectation of every element is kept.
    """
    factors = rescale_factors(density, rescale=rescale)
    draws = list(zip(keys, density, factors, strict=True))

    def sparsify(block: Block) -> list[Float32]:
        deltas = block.deltas
        for delta, (key, probability, factor) in zip(deltas, draws, strict=True):
            delta *= bernoulli(key, block.start, delta.size, probability)
            delta *= factor
        return deltas

    return sparsify


def rescale_factors(density: Sequence[float], *, rescale: bool) -> list[np.float32]:
    """What a kept change is multiplied by: 1/density, so that the expectation of every element is kept."""
    return [np.float32(1 / d) if rescale and d > 0 else np.float32(1) for d in density]


def check_window(density: float, epsilon: float) -> None:
    """Raise ValueError unless every keep probability from density - epsilon to density + epsilon is one.

    0 is none of them: what is never kept cannot be rescaled. A density of 0 or 1 drops or keeps everything, whatever
    the epsilon.
    """
    if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise ValueError(
            f"`density` {density:g} with `epsilon` {epsilon:g} asks for keep probabilities from {density - epsilon:g} "
            f"to {density + epsilon:g}, which must lie between 0 and 1; make epsilon smaller than "
            f"{min(density, 1 - density):g}"
        )


def row_ranks(x: Float32, width: int) -> npt.NDArray[np.int64]:
    """Place of every element among those of its row by magnitude, 0 the smallest, [n] for whole rows x [n].

    Of equal magnitudes the first counts as the larger, so the ranks of a row are a permutation.
    """
    from solera_merge.kernels.ranks import rank_rows

    magnitude = np.ascontiguousarray(x).view(np.uint32) & np.uint32(0x7FFFFFFF)
    ranks = np.empty(x.size, np.int64)
    if x.size:
        rank_rows(magnitude, width, ranks)
    return ranks


def drop_by_rank(tensor: Tensor, density: Sequence[float], epsilon: Sequence[float], *, rescale: bool) -> Sparsify:
    """m_i tau_i, divided by each element's own keep probability with `rescale`, for blocks of whole rows (DELLA).

    The keep probability of an element rises linearly with its rank by magnitude within its row, from
    density_i - epsilon_i for the smallest to density_i + epsilon_i for the largest; the only element of a row has the
    middle of both, density_i. So the mean over a row is the density.

    Raises:
        ValueError: see `check_window`.
    """
    width = tensor.shape[-1] if tensor.shape else 1
    tables = [rank_tables(width, d, e, rescale=rescale) for d, e in zip(density, epsilon, strict=True)]
    draws = list(zip(tensor.keys, density, tables, strict=True))

    def sparsify(block: Block) -> list[Float32]:
        deltas = block.deltas
        for delta, (key, share, (limits, factors)) in zip(deltas, draws, strict=True):
            if 0 < share < 1:
                ranks = row_ranks(delta, width)
                delta *= words(key, block.start, delta.size) < limits[ranks]
                delta *= factors[ranks]
            elif share == 0:
                delta *= 0
        return deltas

    return sparsify


def rank_tables(width: int, density: float, epsilon: float, *, rescale: bool) -> tuple[npt.NDArray[np.uint32], Float32]:
    """For every rank (the random words below which an element is kept, the factor on what is kept), [width] each."""
    check_window(density, epsilon)
    place = np.arange(width) / (width - 1) if width > 1 else np.full(width, 0.5)
    probability = density + epsilon * (2 * place - 1)
    limits = np.minimum(np.round(probability * 2.0**32), 2.0**32 - 1).astype(np.uint32)
    with np.errstate(divide="ignore"):  # a density of 0 keeps nothing, and needs no factor
        factors = 1 / probability if rescale else np.ones(width)
    return limits, factors.astype(np.float32)

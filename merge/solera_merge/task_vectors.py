"""The steps that methods on task vectors share: sparsify -> elect a sign -> combine -> scale -> add to the base.

A method of the family is one choice for each: `on_base(sparsify, combine)`, where `sparsify` is made by a function of
this file and `combine` is `weighted_sum` or `disjoint_merge` of `signs.py`.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from solera_merge.block import Block, Float32, Formula
from solera_merge.masks import bernoulli
from solera_merge.selection import Kept

__all__ = ["Combine", "Sparsify", "drop_at_random", "keep", "on_base"]

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


def keep(kept: Sequence[Kept]) -> Sparsify:
    """Only the selected elements of every task vector, one selection a model."""

    def sparsify(block: Block) -> list[Float32]:
        return [delta * k.keeps(delta, block.start) for delta, k in zip(block.deltas, kept, strict=True)]

    return sparsify


def drop_at_random(keys: Sequence[int], density: Sequence[float], *, rescale: bool) -> Sparsify:
    """m_i tau_i, divided by density_i with `rescale`; m_i ~ Bernoulli(density_i) (DARE, arXiv 2311.03099, section 3).

    The rescale is the paper's, so the expectation of every element is kept.
    """
    factors = [np.float32(1 / d) if rescale and d > 0 else np.float32(1) for d in density]
    draws = list(zip(keys, density, factors, strict=True))

    def sparsify(block: Block) -> list[Float32]:
        deltas = block.deltas
        for delta, (key, probability, factor) in zip(deltas, draws, strict=True):
            delta *= bernoulli(key, block.start, delta.size, probability)
            delta *= factor
        return deltas

    return sparsify

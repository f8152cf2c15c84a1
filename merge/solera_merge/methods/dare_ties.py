"""DARE before TIES: drop changes at random and rescale the rest, then elect a sign and combine."""

from collections.abc import Sequence

import numpy as np

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.masks import bernoulli
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.signs import disjoint_merge

__all__ = ["dare_ties", "rescale_factors"]


def dare_ties(
    tensor: Tensor,
    /,
    *,
    weight: PerModel[Finite],
    density: PerModel[Fraction] = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: Finite = 1.0,
    int8_mask: bool = False,
) -> Formula:
    """As TIES, with tau_i replaced by m_i tau_i / density_i, m_i ~ Bernoulli(density_i).

    DARE: Language models are super Mario, arXiv 2311.03099, section 3; the election is that of TIES (2306.01708).

    The rescale is the paper's 1/density, so the expectation of every element is kept. mergekit instead scales what is
    left to the L1 norm of the whole tensor: the same on average, but it needs another pass and, in float16, overflows.
    The masks come from a counter-based generator keyed by (seed, tensor, model): the same seed gives the same bytes.

    Args:
        tensor: base and models; only its keys are used.
        weight: w_i.
        density: probability that a change is kept.
        normalize: divide by the weights of the agreeing models; without it a plain sum.
        rescale: divide what is kept by the density.
        lambda_: scale of the merged task vector.
        int8_mask: accepted because mergekit recipes carry it; no mask is stored here, so it changes nothing.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    del int8_mask
    factors = rescale_factors(density, rescale=rescale)
    draws = list(zip(tensor.keys, density, factors, strict=True))

    def formula(block: Block) -> Float32:
        deltas = block.deltas
        for delta, (key, probability, factor) in zip(deltas, draws, strict=True):
            delta *= bernoulli(key, block.start, delta.size, probability)
            delta *= factor
        out = disjoint_merge(deltas, weight, normalize=normalize, scale=lambda_)
        assert block.base is not None
        out += block.base
        return out

    return formula


def rescale_factors(density: Sequence[float], *, rescale: bool) -> list[np.float32]:
    """What a kept change is multiplied by: 1/density, so that the expectation of every element is kept."""
    return [np.float32(1 / d) if rescale and d > 0 else np.float32(1) for d in density]

"""DARE before TIES: drop changes at random and rescale the rest, then elect a sign and combine."""

from functools import partial

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.signs import disjoint_merge
from solera_merge.task_vectors import drop_at_random, on_base

__all__ = ["dare_ties"]


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
    sparsify = drop_at_random(tensor.keys, density, rescale=rescale)
    return on_base(sparsify, partial(disjoint_merge, weight=weight, normalize=normalize, scale=lambda_))

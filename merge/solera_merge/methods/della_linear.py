"""DELLA without signs: drop changes at random, small ones more often, rescale the rest, then add them up."""

from functools import partial

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.signs import weighted_sum
from solera_merge.task_vectors import drop_by_rank, on_base

__all__ = ["della_linear"]


def della_linear(
    tensor: Tensor,
    /,
    *,
    weight: PerModel[Finite],
    density: PerModel[Fraction] = (1.0,),
    epsilon: PerModel[Fraction] = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: Finite = 1.0,
    int8_mask: bool = False,
) -> Formula:
    """W = W_0 + lambda sum_i w_i m_i tau_i / p_i, m_i ~ Bernoulli(p_i), p_i rising with the rank of |tau_i| in its row.

    DELLA-Merging, arXiv 2406.11617, section 3, with the sum of task arithmetic in place of the election. Probabilities,
    masks and rescale are those of `della`, where also stands what differs from the paper and from mergekit. The
    expectation is that of task arithmetic.

    Args:
        tensor: base and models; only its shape and keys are used.
        weight: w_i; a negative weight subtracts a task.
        density: mean probability that a change is kept.
        epsilon: how far the probability of the largest and the smallest change of a row is from the density. All must
            lie between 0 and 1, unless the density is 0 or 1.
        normalize: divide the sum by sum_i w_i.
        rescale: divide what is kept by its keep probability.
        lambda_: scale of the merged task vector.
        int8_mask: accepted because mergekit recipes carry it; no mask is stored here, so it changes nothing.

    Returns:
        The formula of a block of whole rows: base [n], N models [n] -> [n].

    Raises:
        ValueError: a keep probability is not between 0 and 1.
    """
    del int8_mask
    sparsify = drop_by_rank(tensor, density, epsilon, rescale=rescale)
    return on_base(sparsify, partial(weighted_sum, weight=weight, normalize=normalize, scale=lambda_))

"""DARE: drop changes at random and rescale the rest, then add them up."""

from functools import partial

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.signs import weighted_sum
from solera_merge.task_vectors import drop_at_random, on_base

__all__ = ["dare_linear"]


def dare_linear(
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
    """W = W_0 + lambda sum_i w_i m_i tau_i / density_i, m_i ~ Bernoulli(density_i).

    DARE with task arithmetic: Language models are super Mario, arXiv 2311.03099, section 3.

    The rescale is the paper's 1/density, so the expectation is that of task arithmetic. mergekit scales what is left
    to the L1 norm of the whole tensor; rescale and masks are those of `dare_ties`, see there.

    Args:
        tensor: base and models; only its keys are used.
        weight: w_i; a negative weight subtracts a task.
        density: probability that a change is kept.
        normalize: divide the sum by sum_i w_i.
        rescale: divide what is kept by the density.
        lambda_: scale of the merged task vector.
        int8_mask: accepted because mergekit recipes carry it; no mask is stored here, so it changes nothing.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    del int8_mask
    sparsify = drop_at_random(tensor.keys, density, rescale=rescale)
    return on_base(sparsify, partial(weighted_sum, weight=weight, normalize=normalize, scale=lambda_))

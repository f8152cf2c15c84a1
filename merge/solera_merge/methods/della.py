"""DELLA: drop changes at random, small ones more often, rescale the rest, then elect a sign and combine."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.signs import disjoint_merge
from solera_merge.task_vectors import check_window, drop_by_rank, on_base

__all__ = ["check_della", "della"]


def della(
    tensor: Tensor,
    /,
    *,
    weight: PerModel[Finite],
    density: PerModel[Fraction] = (1.0,),
    epsilon: PerModel[Fraction] = (0.15,),
    normalize: bool = True,
    rescale: bool = True,
    lambda_: Finite = 1.0,
    int8_mask: bool = False,
) -> Formula:
    """As TIES, with tau_i replaced by m_i tau_i / p_i, m_i ~ Bernoulli(p_i), p_i rising with the rank of |tau_i|.

    DELLA-Merging, arXiv 2406.11617, section 3: of the r = 0 .. n-1 elements of a row (the last axis; a vector is one
    row) in the order of their magnitudes, element r is kept with p = density - epsilon + 2 epsilon r / (n - 1); the
    only element of a row with p = density. What is kept is divided by its own p, so the expectation of every element
    is kept. The election is that of TIES (2306.01708).

    The paper speaks of drop probabilities, in a window of total width epsilon; as in the authors' code and in mergekit
    the window is density plus and minus epsilon here (the paper's epsilon is twice this one).

    mergekit scales what is left to the L1 norm of the tensor instead: with density 0.3 and epsilon 0.25 the large
    elements then come out 1.34 times too large on average, and the small ones at a quarter. It fails on rows of one
    element, and ranks a tensor of three axes along the middle one. Masks are drawn as in `dare_ties`.

    Args:
        tensor: base and models; only its shape and keys are used.
        weight: w_i.
        density: mean probability that a change is kept.
        epsilon: how far the probability of the largest and the smallest change of a row is from the density. All must
            lie between 0 and 1, unless the density is 0 or 1.
        normalize: divide by the weights of the agreeing models; without it a plain sum.
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
    return on_base(sparsify, partial(disjoint_merge, weight=weight, normalize=normalize, scale=lambda_))


def check_della(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError where density and epsilon give a keep probability that is none."""
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        check_window(density, epsilon)

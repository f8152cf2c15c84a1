"""Model Breadcrumbs before TIES: drop the largest and the small changes, then elect a sign and combine."""

from collections.abc import Sequence
from functools import partial

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.scope import Scope
from solera_merge.selection import Kept, middle_deltas
from solera_merge.signs import disjoint_merge
from solera_merge.task_vectors import keep, keep_norm, on_base

__all__ = ["breadcrumbs_ties"]


def breadcrumbs_ties(
    tensor: Tensor,
    of_model: Sequence[Kept] | None = None,
    /,
    *,
    weight: PerModel[Finite],
    density: PerModel[Fraction] = (1.0,),
    gamma: PerModel[Fraction] = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: Finite = 1.0,
    scope: Scope = "tensor",
    int8_mask: bool = False,
) -> Formula:
    """As TIES, with the trim of `breadcrumbs`: the `gamma` largest elements of tau_i are dropped too.

    Model Breadcrumbs, arXiv 2312.06795, section 3; the election is that of TIES (2306.01708). The combination is
    mergekit's; neither paper has it. What differs from mergekit is said at `breadcrumbs` (very small tensors) and
    at `ties` (the divisor, where weights have mixed signs).

    Args:
        tensor: base and models; read up to three times where a density is below 1 and the scope is the tensor.
        of_model: what the survey over the model says to keep of every task vector, where the scope is the model.
        weight: w_i.
        density: share of the task vector that is kept.
        gamma: share of the task vector, its largest elements, that is dropped.
        normalize: divide by the weights of the agreeing models; without it a plain sum.
        rescale: multiply what is kept of a task vector so that it has the L1 norm of the whole, tensor by tensor.
        lambda_: scale of the merged task vector.
        scope: `tensor`: shares of every tensor; `model`: of the whole model, by one pair of thresholds.
        int8_mask: accepted because mergekit recipes carry it; no mask is stored here, so it changes nothing.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    del int8_mask
    assert (of_model is not None) == (scope == "model")
    kept = middle_deltas(tensor, density, gamma) if of_model is None else of_model
    factors = keep_norm(tensor, kept) if rescale else None
    return on_base(keep(kept, factors), partial(disjoint_merge, weight=weight, normalize=normalize, scale=lambda_))

"""TIES: trim small changes, elect a sign, average the models that agree with it."""

from collections.abc import Sequence
from functools import partial

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.scope import Scope
from solera_merge.selection import Kept, largest_deltas
from solera_merge.signs import disjoint_merge
from solera_merge.task_vectors import keep, keep_norm, on_base

__all__ = ["ties"]


def ties(
    tensor: Tensor,
    of_model: Sequence[Kept] | None = None,
    /,
    *,
    weight: PerModel[Finite],
    density: PerModel[Fraction] = (1.0,),
    normalize: bool = True,
    rescale: bool = False,
    lambda_: Finite = 1.0,
    scope: Scope = "tensor",
    int8_mask: bool = False,
) -> Formula:
    """W = W_0 + lambda sum_i [sign(w_i tau_i) = s] w_i tau_i / sum_i [sign(w_i tau_i) = s] |w_i|.

    TIES-merging, arXiv 2306.01708, section 3.2:
    1. tau_i = W_i - W_0, of which only the `density` largest by magnitude are kept (exact; ties by flat index);
    2. s = sign(sum_i w_i tau_i), a sum of 0 counts as plus;
    3. the weighted mean of those that have the elected sign.

    The paper trims over the whole model: `scope: model`. mergekit trims every tensor by itself, the default here too.
    mergekit divides by sum w_i, not sum |w_i|: the same for positive weights, but with mixed signs the divisor can
    almost vanish (weights 1 and -0.99 and deltas of 0.01 give a merged delta of 1.99 there, 0.01 here).
    `rescale` is mergekit's; the paper has no such step.

    Args:
        tensor: base and models; read up to three times where a density is below 1 and the scope is the tensor.
        of_model: what the survey over the model says to keep of every task vector, where the scope is the model.
        weight: w_i.
        density: share of the task vector that is kept.
        normalize: divide by the weights of the agreeing models; without it a plain sum.
        rescale: multiply what is kept of a task vector so that it has the L1 norm of the whole, tensor by tensor.
        lambda_: scale of the merged task vector.
        scope: `tensor`: keep that share of every tensor; `model`: of the whole model, by one threshold.
        int8_mask: accepted because mergekit recipes carry it; no mask is stored here, so it changes nothing.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    del int8_mask
    assert (of_model is not None) == (scope == "model")
    kept = largest_deltas(tensor, density) if of_model is None else of_model
    factors = keep_norm(tensor, kept) if rescale else None
    return on_base(keep(kept, factors), partial(disjoint_merge, weight=weight, normalize=normalize, scale=lambda_))

"""Model Breadcrumbs: drop the largest and the small changes, then add up the rest."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, Fraction, PerModel
from solera_merge.scope import Scope
from solera_merge.selection import Kept, middle_deltas
from solera_merge.signs import weighted_sum
from solera_merge.task_vectors import keep, keep_norm, on_base

__all__ = ["breadcrumbs", "held_inner_search"]


def breadcrumbs(
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
    """W = W_0 + lambda sum_i w_i m_i tau_i, m_i = 1 for the `density` largest but the `gamma` largest of all.

    Model Breadcrumbs, arXiv 2312.06795, section 3: outliers and negligible changes are masked in every tensor. Of the
    n elements of tau_i in the order of their magnitudes, the int(gamma n) largest are dropped, the int(density n) next
    are kept (at least one), and the rest is dropped. Exact; of equal magnitudes the first by flat index counts as the
    larger.

    The paper gives the shares that are dropped at either end (beta at the small one); as in mergekit it is gamma and
    density = 1 - beta - gamma here, and gamma yields where both together exceed 1; so a density of 1 keeps everything.
    mergekit up to 0.1.4 dropped the whole task vector where int(gamma n) was 0. Its 0.1.5 drops that of a tensor with
    fewer than 1 / density elements; here the one next to the outliers stays, as in `ties`.

    Args:
        tensor: base and models; read up to three times where a density is below 1 and the scope is the tensor.
        of_model: what the survey over the model says to keep of every task vector, where the scope is the model.
        weight: w_i; a negative weight subtracts a task.
        density: share of the task vector that is kept.
        gamma: share of the task vector, its largest elements, that is dropped.
        normalize: divide the sum by sum_i w_i.
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
    return on_base(keep(kept, factors), partial(weighted_sum, weight=weight, normalize=normalize, scale=lambda_))


def held_inner_search(_shape: tuple[int, ...], parameters: Mapping[str, Any]) -> int:
    """Bytes: a second search a model, for the elements that are left out."""
    return (3 << 20) * len(parameters["density"])

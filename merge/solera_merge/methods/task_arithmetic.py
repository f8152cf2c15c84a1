"""The base plus a weighted sum of task vectors."""

from functools import partial

from solera_merge.block import Formula, Tensor
from solera_merge.methods.signature import Finite, PerModel
from solera_merge.signs import weighted_sum
from solera_merge.task_vectors import on_base

__all__ = ["task_arithmetic"]


def task_arithmetic(
    _tensor: Tensor, /, *, weight: PerModel[Finite], normalize: bool = False, lambda_: Finite = 1.0
) -> Formula:
    """W = W_0 + lambda sum_i w_i (W_i - W_0).

    Editing models with task arithmetic, arXiv 2212.04089, section 2.

    Args:
        weight: w_i; a negative weight subtracts a task.
        normalize: divide the sum by sum_i w_i.
        lambda_: scale of the merged task vector.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """
    combine = partial(weighted_sum, weight=weight, normalize=normalize, scale=lambda_)
    return on_base(lambda block: block.deltas, combine)

"""The base plus a weighted sum of task vectors."""

import numpy as np

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Finite, PerModel
from solera_merge.signs import total

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
    coefficients = [np.float32(w) for w in weight]
    divisor = np.float32(
        sum(weight) or 1.0
    )  # all 0 (a gradient may begin so) means the base; the plan refuses other sums of 0

    def formula(block: Block) -> Float32:
        out = total([delta * c for delta, c in zip(block.deltas, coefficients, strict=True)])
        if normalize and divisor != 1:
            out /= divisor
        if lambda_ != 1:
            out *= np.float32(lambda_)
        assert block.base is not None
        out += block.base
        return out

    return formula

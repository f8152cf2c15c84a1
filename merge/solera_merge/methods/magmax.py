"""The task vector that changes an element most decides it."""

import numpy as np

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Finite

__all__ = ["magmax"]


def magmax(_tensor: Tensor, /, *, lambda_: Finite = 1.0) -> Formula:
    """W = W_0 + lambda tau_k, for every element k = argmax_i |tau_i|, tau_i = W_i - W_0.

    MagMax, arXiv 2407.06322. Where several task vectors have the largest magnitude the last of them in the
    recipe counts, as in the authors' code. (In the paper the models come from fine-tuning one after the other, so the
    last is the latest.) Their script sets lambda to 0.5; here 1 is the default, as for every task-vector method.
    mergekit does not have this method.

    Args:
        lambda_: scale of the merged task vector.

    Returns:
        The formula of a block: base [n], N models [n] -> [n].
    """

    def formula(block: Block) -> Float32:
        largest, *others = block.deltas
        for delta in others:
            largest = np.where(np.abs(delta) >= np.abs(largest), delta, largest)
        if lambda_ != 1:
            largest = largest * np.float32(lambda_)
        assert block.base is not None
        return block.base + largest

    return formula

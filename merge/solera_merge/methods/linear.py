"""Weighted average (model soup)."""

import numpy as np

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Finite, PerModel
from solera_merge.signs import total

__all__ = ["linear"]


def linear(_tensor: Tensor, /, *, weight: PerModel[Finite], normalize: bool = True) -> Formula:
    """W = sum_i w_i W_i / sum_i w_i.

    Model soups, arXiv 2203.05482, section 2 (there with equal weights).

    Args:
        weight: w_i.
        normalize: divide by the sum of the weights; without it a plain weighted sum.

    Returns:
        The formula of a block: N models [n] -> [n].
    """
    coefficients = [np.float32(w) for w in weight]
    divisor = np.float32(sum(weight))

    def formula(block: Block) -> Float32:
        out = total([model * c for model, c in zip(block.models, coefficients, strict=True)])
        if normalize and divisor != 1:
            out /= divisor
        return out

    return formula

"""One model as it is: for stacking layers of several models."""

import numpy as np

from solera_merge.block import Block, Float32, Formula, Tensor
from solera_merge.methods.signature import Finite, PerModel

__all__ = ["passthrough"]


def passthrough(_tensor: Tensor, /, *, scale: PerModel[Finite] = (1.0,)) -> Formula:
    """W = scale W_1.

    Args:
        scale: factor on the tensor; 1 copies it bit for bit.

    Returns:
        The formula of a block: one model [n] -> [n].
    """
    factor = np.float32(scale[0])

    def formula(block: Block) -> Float32:
        return block.models[0] if factor == 1 else block.models[0] * factor

    return formula

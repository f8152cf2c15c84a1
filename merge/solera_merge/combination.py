"""Results that lie in the span of the models: one coefficient a model is all that a method has to find.

The coefficients depend on the models only through their inner products (`solera_merge.reduction.gram`), so even an
iterative method reads a tensor once to find them and once to apply them.
"""

import math
from collections.abc import Sequence

import numpy as np

from solera_merge.block import Block, Float32
from solera_merge.signs import total

__all__ = ["combine", "inner"]


def combine(block: Block, coefficients: Sequence[float | Float32]) -> Float32:
    """sum_i c_i x_i, with x_i the models; or W_0 + sum_i c_i tau_i where the method has a base, [n] float32.

    Args:
        block: N models [n], perhaps a base [n].
        coefficients: N numbers, or N float32 [n].
    """
    out = total([x * np.float32(c) for x, c in zip(block.vectors, coefficients, strict=True)])
    if block.base is not None:
        out += block.base
    return out


def inner(gram: Sequence[Sequence[float]], a: Sequence[float], b: Sequence[float]) -> float:
    """<sum_i a_i x_i, sum_j b_j x_j> from the inner products of the x_i, [N][N]; the same in any order of the models.

    Example:
        >>> inner([[1.0, 0.0], [0.0, 4.0]], [3.0, 1.0], [1.0, 1.0])
        7.0
    """
    return math.fsum(a[i] * b[j] * gram[i][j] for i in range(len(a)) for j in range(len(b)))

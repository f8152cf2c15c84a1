"""Sums over a whole tensor whose last bit does not depend on blocks or threads."""

import math

import numpy as np
import numpy.typing as npt

from solera_merge.block import CHUNK_ELEMENTS, Tensor

__all__ = ["norms_and_dot"]


def norms_and_dot(tensor: Tensor) -> tuple[float, float, float]:
    """(|base|, |model|, <base, model>) of the base and the one model, in one pass, fp64.

    Products of float32 are exact in float64. They are summed in chunks of fixed length at fixed places, and the sums
    of the chunks are added exactly (math.fsum), so the result has one value whatever the block size. BLAS is avoided:
    it splits a dot product by the number of threads.
    """
    squares_base: list[float] = []
    squares_model: list[float] = []
    products: list[float] = []
    for block in tensor.blocks():
        assert block.base is not None
        a, b = block.base.astype(np.float64), block.models[0].astype(np.float64)
        squares_base += _chunk_sums(a * a)
        squares_model += _chunk_sums(b * b)
        products += _chunk_sums(a * b)
    return math.sqrt(math.fsum(squares_base)), math.sqrt(math.fsum(squares_model)), math.fsum(products)


def _chunk_sums(values: npt.NDArray[np.float64]) -> list[float]:
    whole = values.size // CHUNK_ELEMENTS * CHUNK_ELEMENTS
    sums: list[float] = np.add.reduce(values[:whole].reshape(-1, CHUNK_ELEMENTS), axis=1).tolist()
    if whole < values.size:  # only the end of the tensor is not a whole chunk
        sums.append(float(np.add.reduce(values[whole:])))
    return sums
